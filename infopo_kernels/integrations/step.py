"""One step of preference training on an attached model: reference, loss, metrics. Shared by the trainers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from infopo_kernels.integrations.randomness import Mode, in_mode
from infopo_kernels.integrations.sealed import Sealed
from infopo_kernels.integrations.transformers import LinearLogpsOutput, check_attached, own_output
from infopo_kernels.objectives import InfoPO, Objective
from infopo_kernels.options import IGNORE_INDEX
from infopo_kernels.output import PreferenceOutput

LAYOUT_KEYS: Final = (
    "labels", "shift_labels", "cu_seqlens", "rows", "rejected_start", "sequence_group", "data_group",
)  # fmt: skip
"""The keys of a batch that describe the layout, for policy and reference alike."""
EXACT_KEYS: Final = ("ref_logps", "ref_chosen_logps", "ref_rejected_logps", "sequence_weights")
"""The keys that must stay float64 between collator and loss."""
_LOSS_KEYS: Final = ("is_chosen", "ref_logps", "sequence_weights", "num_pairs", "num_rejected")
_HOST_KEYS: Final = ("num_rejected", "rejected_start")
"""Numbers that the host needs, and the model does not."""
_TRL_KEYS: Final = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
_TOKEN_KEYS: Final = (
    "input_ids", "attention_mask", "labels", "shift_labels", "position_ids", "token_type_ids", "mm_token_type_ids",
)  # fmt: skip
"""Keys that hold one row for each sequence, so that we know how to cut them."""
SCORED_TOKENS: Final = 12
"""Where `metric_sums` holds the number of scored tokens."""
MAXIMA: Final = 2
"""The last entries of `metric_sums`: they do not add up, the largest counts."""
_PACK_KEYS: Final = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")

Inputs = dict[str, Any]


def split_inputs(inputs: Inputs) -> tuple[Inputs, Inputs]:
    """Two dictionaries: the inputs of model and head, and the inputs of the loss that the batch holds.

    Takes the batches of `infopo_kernels.integrations.collators`, and those of TRL's collators (`completion_mask`
    instead of `labels`). The second holds `is_chosen`, `ref_logps`, `sequence_weights`, `num_pairs` and `num_rejected`.
    """
    known: Inputs = {key: inputs[key] for key in _LOSS_KEYS if key in inputs}
    model = {key: value for key, value in inputs.items() if key not in (*_LOSS_KEYS, *_TRL_KEYS)}
    if "labels" not in model and "shift_labels" not in model:
        if "completion_mask" not in inputs:
            raise ValueError(
                f"The batch holds neither `labels` nor `completion_mask` (found: {', '.join(inputs)}); use a collator "
                f"of infopo_kernels.integrations.collators, and remove_unused_columns=False."
            )
        model["labels"] = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE_INDEX)
    if "ref_rejected_logps" in inputs and "ref_logps" not in known:
        rejected = inputs["ref_rejected_logps"].double()
        chosen = inputs.get("ref_chosen_logps")
        chosen = torch.full_like(rejected, torch.nan) if chosen is None else chosen.double()
        known["ref_logps"] = torch.cat([chosen, rejected])
    return model, known


def number_of_sequences(model_inputs: Inputs) -> int:
    """S."""
    cu_seqlens = model_inputs.get("cu_seqlens")
    return len(model_inputs["input_ids"]) if cu_seqlens is None else len(cu_seqlens) - 1


def num_rejected(model_inputs: Inputs, known: Inputs) -> list[int]:
    """How many rejected sequences each prompt (chosen sequence) has.

    The collators' batches say it where prompts have several. Where a batch holds `sequence_weights` alone, they say it
    (w for the chosen sequence, w / K for each of K rejected ones), and the host waits for them.
    """
    if "num_rejected" in known:
        return list(known["num_rejected"])
    if "sequence_weights" not in known:
        return [1] * (number_of_sequences(model_inputs) // 2)
    weights: list[float] = known["sequence_weights"].tolist()
    prompts = int(known["num_pairs"])
    counts: list[int] = []
    for weight in weights[:prompts]:
        counts.append(round(weight / weights[prompts + sum(counts)]))
    return counts


def rejected_prompts(counts: Sequence[int], device: torch.device) -> Tensor:
    """[number of rejected sequences] int64: the prompt that each belongs to, where prompts have so many. The host does
    not wait for the device."""
    if len(set(counts)) == 1:
        return torch.arange(len(counts), device=device)[:, None].expand(-1, counts[0]).flatten()
    index = torch.tensor([prompt for prompt, count in enumerate(counts) for _ in range(count)], dtype=torch.int64)
    return _copied(index, device)


def _copied(values: Tensor, device: torch.device) -> Tensor:
    """On `device`, through pinned memory: the host would wait for a copy of other memory."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def number_of_chosen(model_inputs: Inputs, known: Inputs) -> int:
    """Chosen sequences, which come first: one for each prompt."""
    return number_of_sequences(model_inputs) - sum(num_rejected(model_inputs, known))


def can_be_cut(model_inputs: Inputs) -> bool:
    """Whether we know how to take sequences out of a batch.

    We do not with shared prompts, nor with tensors that do not hold one row for each sequence: image patches have
    another number, which may equal the number of sequences by accident.
    """
    if "rows" in model_inputs:
        return False
    known = (*_TOKEN_KEYS, *_PACK_KEYS)
    return all(key in known or not isinstance(value, Tensor) for key, value in model_inputs.items())


def rejected_half(model_inputs: Inputs, num_chosen: int) -> Inputs:
    """The part of a batch, chosen first, that holds the rejected sequences; only of one that `can_be_cut`.

    In a pack they begin at `rejected_start`; where that is missing, the host waits for the bounds.
    """
    cu_seqlens = model_inputs.get("cu_seqlens")
    if cu_seqlens is None:
        S = number_of_sequences(model_inputs)

        def rejected(value: Tensor) -> Tensor:
            if value.ndim == 3 and value.shape[0] != S:  # position ids of several kinds, [3, S, T] of Qwen-VL
                return value[:, num_chosen:]
            return value[num_chosen:] if value.shape[0] == S else value  # [1, T] goes for all sequences

        return {k: rejected(v) if isinstance(v, Tensor) else v for k, v in model_inputs.items()}
    start = model_inputs.get("rejected_start")
    start = int(cu_seqlens[num_chosen]) if start is None else start
    half = {k: v[..., start:] if k in _TOKEN_KEYS else v for k, v in model_inputs.items() if k != "rejected_start"}
    for key in ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k"):
        if key in half:
            half[key] = cu_seqlens[num_chosen:] - start
    return half


def reference_logps(
    model: Any,
    model_inputs: Inputs,
    *,
    average: bool,
    skip_chosen: bool = False,
    num_chosen: int | None = None,
    adapter: Any = None,
    mode: Mode = "evaluation",
) -> Tensor:
    """[S] float64 log-probabilities without gradient, nats; NaN for the chosen sequences with `skip_chosen`.

    The model runs in the mode `mode`; afterwards each module is back in its own mode.

    Args:
        model: with `attach_linear_logps`, wrapped or not.
        model_inputs: the first of `split_inputs`.
        average: means over the scored tokens instead of sums.
        skip_chosen: form those of the rejected sequences only.
        num_chosen: chosen sequences, which come first; None for half of all.
        adapter: a context in which `model` is its own reference (the adapter switched off).
        mode: "evaluation", or "training" for a model in which nothing is random and that works in training mode only.

    Raises:
        RuntimeError: the model is not attached any more.
    """
    num_chosen = number_of_sequences(model_inputs) // 2 if num_chosen is None else num_chosen
    # Where we cannot cut the batch, the model scores the chosen half too, and we ignore the result.
    cut = skip_chosen and can_be_cut(model_inputs)
    inputs = rejected_half(model_inputs, num_chosen) if cut else model_inputs
    inputs = {key: value for key, value in inputs.items() if key not in ("output_router_logits", "rejected_start")}
    check_attached(model)
    with torch.no_grad(), in_mode(model, mode), _without_freezing(model, adapter):
        logps = own_output(model, model(**inputs, linear_logps="mean" if average else "sum")).logps
    assert logps is not None
    if not skip_chosen:
        return logps
    rejected = logps if cut else logps[num_chosen:]
    return torch.cat([rejected.new_full((num_chosen,), torch.nan), rejected])


@contextlib.contextmanager
def _without_freezing(model: Any, adapter: Any) -> Iterator[None]:
    """Enter `adapter`, and undo what it does to `requires_grad`: PEFT freezes an adapter that it switches off.

    FSDP2 reads the flags in its first forward, and fails later in mixed precision if nothing was trained then. And
    while a unit is gathered, PEFT would unfreeze the gathered weights in place of the parts, which stay frozen for
    ever.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()] if adapter else []
    with adapter or contextlib.nullcontext():
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        yield


def preference_output(
    model: Any, model_inputs: Inputs, known: Inputs, objective: Objective, *, skip_chosen_reference: bool = False
) -> tuple[LinearLogpsOutput, PreferenceOutput]:
    """The attached model's output with the loss of a batch, and the parts of the loss.

    Raises:
        RuntimeError: the model is not attached any more.
    """
    check_attached(model)
    skip = skip_chosen_reference and known.get("ref_logps") is not None
    given = {k: Sealed(v) if k in EXACT_KEYS else v for k, v in (model_inputs | known).items() if k not in _HOST_KEYS}
    out = own_output(model, model(**given, objective=objective, skip_chosen_reference=skip))
    assert out.infopo is not None
    return out, out.infopo


def pairs_per_rank(pairs: float, group: Any = None) -> float:
    """The `num_pairs` to give on each rank where a wrapper averages gradients (DDP, FSDP, DeepSpeed).

    The loss is a sum over sequences divided by `num_pairs`. Its average over the pairs of all ranks divides by their
    number. The wrapper divides by the number of ranks R once more, so `num_pairs` is the number of all pairs over R.
    Where all ranks have as many pairs, this is each rank's own number. Where they have not (an incomplete last batch,
    chosen and rejected sequences on different ranks), call this function.

    Args:
        pairs: pairs on this rank; 0.5 for a sequence whose other half is elsewhere.
        group: ranks over which the wrapper averages; None for all.

    Returns:
        Sum of `pairs` over the ranks, over their number. Waits for all of them.
    """
    if not torch.distributed.is_initialized():
        return pairs
    device = "cuda" if torch.distributed.get_backend(group) == "nccl" else "cpu"
    total = torch.tensor(pairs, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total, group=group)
    return float(total) / torch.distributed.get_world_size(group)


def counted_once(inputs: Inputs, unique: int, pairs: float) -> Inputs:
    """The batch with weights such that only its first `unique` prompts count; the loss is divided by `pairs`.

    Accelerate fills an incomplete last batch with pairs from the first one, so that every rank has as many.
    """
    model_inputs, known = split_inputs(inputs)
    S, counts = number_of_sequences(model_inputs), num_rejected(model_inputs, known)
    device = model_inputs["labels"].device
    weights = known.get("sequence_weights")
    weights = torch.ones(S, dtype=torch.float64, device=device) if weights is None else weights
    prompts = torch.cat([torch.arange(S - sum(counts), device=device), rejected_prompts(counts, device)])
    own = {"sequence_weights": weights * (prompts < unique), "num_pairs": pairs, "num_rejected": counts}
    return {**inputs, **own}


def metric_sums(
    output: PreferenceOutput, objective: Objective, model_inputs: Inputs | None = None, known: Inputs | None = None
) -> Tensor:
    """The sums of a batch for `metrics`, [20] float64. They add over batches and ranks, but the last `MAXIMA`.

    The host does not wait for the device, but for weights that come without `num_rejected` (see there).

    Args:
        output: of the batch's loss.
        objective: its objective.
        model_inputs, known: of `split_inputs`, for batches with several rejected responses; None for pairs. Sequences
            of weight 0 (see `counted_once`) do not count.
    """
    S, device, known = len(output.is_chosen), output.logps.device, known or {}
    numbers = [1] * (S // 2) if model_inputs is None else num_rejected(model_inputs, known)
    partner, B = rejected_prompts(numbers, device), S - sum(numbers)
    weights, pairs = known.get("sequence_weights"), known.get("num_pairs", S / 2)
    counts = torch.ones_like(output.is_chosen) if weights is None else weights > 0

    def split(values: Tensor) -> tuple[Tensor, Tensor]:
        kept = torch.where(counts, values.double(), 0.0)
        return kept[:B], kept[B:]

    cap, offset = float("inf"), 0.0
    if isinstance(objective, InfoPO):
        cap, offset = cap if objective.max_log_weight is None else objective.max_log_weight, objective.offset
    rewards, logps = split(output.rewards), split(output.logps)
    size = output.weights if weights is None else output.weights / torch.where(counts, weights, 1.0)
    pull = split(size)[1]
    margins, tail = rewards[0][partner] - rewards[1], output.tail
    values = [
        counts[:B].sum(),
        counts[B:].sum(),
        rewards[0].sum(),
        rewards[1].sum(),
        (margins > 0).sum(),
        margins.sum(),
        logps[0].sum(),
        logps[1].sum(),
        output.mi_lower_bound * pairs,
        pull.sum(),
        split(size.float() == 0)[1].sum(),
        split(output.rewards - offset > cap)[1].sum(),
        torch.where(counts, output.scored_tokens, 0).sum(),
        output.loss * pairs,
        pairs,
        tail.mass_mean if tail else 0.0,
        tail.kept_share if tail else 0.0,
        1.0 if tail else 0.0,
        pull.max() if len(pull) else 0.0,
        tail.mass_max if tail else 0.0,
    ]
    return torch.stack(
        [
            value.detach().to(device, torch.float64)
            if isinstance(value, Tensor)
            else torch.full((), value, dtype=torch.float64, device=device)
            for value in values
        ]
    )


def merged(batches: Tensor) -> Tensor:
    """The `metric_sums` of several batches, [R, 20], as those of one, [20]."""
    return torch.cat([batches[:, :-MAXIMA].sum(0), batches[:, -MAXIMA:].amax(0)])


def metrics(sums: Tensor) -> dict[str, float]:
    """The metrics of a step from `metric_sums` of each batch and process, [R, 20]; names of TRL where it has one.

    rewards/chosen, /rejected      ``beta * (logps - ref_logps)``, mean
    rewards/accuracies, /margins   share of rejected responses with a lower reward than the chosen one of their prompt
                                   (a tie is none, as in TRL); mean difference
    logps/chosen, /rejected        mean sequence log-probability, nats
    mi_lower_bound                 nats
    rejected_weight/mean, /max     size of the loss's derivative by a rejected log-probability
    rejected_weight/underflowed    share of rejected sequences whose weight is zero in float32
    rejected_weight/capped         share whose weight is at the cap
    scored_tokens                  in the batches, over all processes
    tail/mass_mean, /mass_max      probability that a token gives to pooled words: mean over batches of `TailSummary`'s
                                   mean, and the largest of all tokens
    tail/kept_share                share of the gradient's columns that were kept, mean over batches

    Without the chosen reference, the metrics that need it are left out; so is the bound where there is none, and the
    tail without a `tail_threshold`.
    """
    total = merged(sums).tolist()
    chosen, rejected = max(total[0], 1.0), max(total[1], 1.0)
    values = {
        "rewards/chosen": total[2] / chosen,
        "rewards/rejected": total[3] / rejected,
        "rewards/accuracies": total[4] / rejected,
        "rewards/margins": total[5] / rejected,
        "logps/chosen": total[6] / chosen,
        "logps/rejected": total[7] / rejected,
        "mi_lower_bound": total[8] / total[14],
        "rejected_weight/mean": total[9] / rejected,
        "rejected_weight/max": total[18],
        "rejected_weight/underflowed": total[10] / rejected,
        "rejected_weight/capped": total[11] / rejected,
        "scored_tokens": total[SCORED_TOKENS],
    }
    if total[17] > 0:
        values["tail/mass_mean"], values["tail/kept_share"] = total[15] / total[17], total[16] / total[17]
        values["tail/mass_max"] = total[19]
    if total[2] != total[2]:
        del values["rewards/accuracies"]  # a comparison with NaN is not NaN
    return {name: value for name, value in values.items() if value == value}


def mean_loss(sums: Tensor) -> float:
    """The loss over all pairs of `metric_sums`, [R, 20]."""
    return float(sums[:, 13].sum() / sums[:, 14].sum())


def check_finite(output: PreferenceOutput, objective: Objective, where: str = "This step") -> None:
    """Raise unless a loss is finite; reads it, and so waits for the device.

    Raises:
        FloatingPointError: it is not; names the sequence, its log-ratio and what to do.
    """
    if bool(torch.isfinite(output.loss)):
        return
    log_ratios = (output.logps - output.ref_logps).tolist()
    chosen = output.is_chosen.tolist()
    # The worst sequence: one whose values are not finite, else the one with the largest weight.
    size = torch.where(torch.isfinite(output.logps) & ~output.weights.isnan(), output.weights, torch.inf)
    worst = int(size.argmax())
    half = "chosen" if chosen[worst] else "rejected"
    number = sum(c == chosen[worst] for c in chosen[:worst])
    if isinstance(objective, InfoPO) and objective.max_log_weight is None:
        cap = "set `max_log_weight` (2 is a start), which lets the exponential go on as its tangent"
    else:
        cap = "lower the learning rate"
    raise FloatingPointError(
        f"{where}: the loss is {float(output.loss.detach())}. {half.capitalize()} response {number} of the batch has "
        f"the log-probability {float(output.logps[worst]):.6g} nats and the log-ratio {log_ratios[worst]:+.6g} nats to "
        f"the reference (weight {float(output.weights[worst]):.3g}). No weight was changed by this step. If the ratio "
        f"is wrong, the reference does not belong to this model or these tokens; if it is right, {cap}, or lower the "
        f"learning rate or `beta`."
    )
