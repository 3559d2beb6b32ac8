"""One step of preference training on an attached model: reference, loss, metrics. Shared by the trainers."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from infopo_kernels.objectives import InfoPOOptions
from infopo_kernels.options import IGNORE_INDEX
from infopo_kernels.output import InfoPOOutput

LAYOUT_KEYS = ("labels", "cu_seqlens", "rows")
"""What a batch tells the head about the layout; both policy and reference take it."""
_LOSS_KEYS = ("is_chosen", "ref_logps")
_TRL_KEYS = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")

Inputs = dict[str, Any]


def split_inputs(inputs: Inputs) -> tuple[Inputs, Inputs]:
    """What model and head take to form log-probabilities; and `is_chosen` and `ref_logps` as far as given.

    Takes the batches of `infopo_kernels.integrations.collators`, and those of TRL's collators (`completion_mask`
    instead of `labels`).
    """
    known = {key: inputs[key] for key in _LOSS_KEYS if key in inputs}
    model = {key: value for key, value in inputs.items() if key not in (*_LOSS_KEYS, *_TRL_KEYS)}
    if "labels" not in model:
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


def rejected_half(model_inputs: Inputs) -> Inputs:
    """The part of a batch, chosen first, that holds the rejected sequences."""
    cu_seqlens = model_inputs.get("cu_seqlens")
    if cu_seqlens is None:
        S = len(model_inputs["labels"])
        return {k: v[S // 2 :] if isinstance(v, Tensor) and len(v) == S else v for k, v in model_inputs.items()}
    middle = (len(cu_seqlens) - 1) // 2
    start = int(cu_seqlens[middle])
    half = {
        k: v[:, start:] if isinstance(v, Tensor) and v.ndim == 2 and v.shape[0] == 1 else v
        for k, v in model_inputs.items()
    }
    half["cu_seqlens"] = cu_seqlens[middle:] - start
    for key in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if key in half:
            half[key] = half["cu_seqlens"]
    return half


def reference_logps(
    model: Any, model_inputs: Inputs, *, average: bool, skip_chosen: bool, adapter: Any = None
) -> Tensor:
    """[2B] float64 log-probabilities without gradient, nats; NaN for the chosen half with `skip_chosen`.

    `adapter` is a context in which `model` is its own reference (the adapter switched off).
    """
    # A batch with shared prompts cannot be cut in two: the chosen half is formed there and left alone.
    cut = skip_chosen and "rows" not in model_inputs
    inputs = rejected_half(model_inputs) if cut else model_inputs
    inputs = {key: value for key, value in inputs.items() if key != "output_router_logits"}
    with torch.no_grad(), adapter or contextlib.nullcontext():
        logps: Tensor = model(**inputs, linear_logps="mean" if average else "sum").logps
    if not skip_chosen:
        return logps
    rejected = logps if cut else logps[len(logps) // 2 :]
    return torch.cat([torch.full_like(rejected, torch.nan), rejected])


def infopo_output(
    model: Any, model_inputs: Inputs, known: Inputs, options: InfoPOOptions, *, skip_chosen_reference: bool = False
) -> Any:
    """The attached model's output with the InfoPO loss of a batch."""
    skip = skip_chosen_reference and known.get("ref_logps") is not None
    return model(**model_inputs, **known, infopo=options, skip_chosen_reference=skip)


def metric_sums(output: InfoPOOutput, options: InfoPOOptions) -> Tensor:
    """What `metrics` needs of a batch, [14] float64; sums may be added over processes.

    The last entry is a maximum, not a sum.
    """
    chosen, rejected = output.is_chosen, ~output.is_chosen
    B = min(int(chosen.sum()), int(rejected.sum()))
    chosen_rewards, rejected_rewards = output.chosen_rewards, output.rejected_rewards
    weights = output.rejected_weights
    cap = float("inf") if options.max_log_weight is None else options.max_log_weight
    values = [
        chosen.sum(),
        rejected.sum(),
        chosen_rewards.sum(),
        rejected_rewards.sum(),
        (chosen_rewards[:B] > rejected_rewards[:B]).sum(),
        (chosen_rewards[:B] - rejected_rewards[:B]).sum(),
        output.chosen_logps.sum(),
        output.rejected_logps.sum(),
        output.mi_lower_bound * len(chosen) / 2,
        weights.sum(),
        (weights.float() == 0).sum(),
        (rejected_rewards - options.offset > cap).sum(),
        output.scored_tokens.sum(),
        weights.max() if len(weights) else weights.new_zeros(()),
    ]
    return torch.stack([value.detach().double() for value in values])


def metrics(sums: Tensor) -> dict[str, float]:
    """The metrics of a step from `metric_sums` of each process, [R, 14]; names of TRL where it has one.

    rewards/chosen, /rejected      ``beta * (logps - ref_logps)``, mean
    rewards/accuracies, /margins   share of pairs with the chosen reward higher; mean difference
    logps/chosen, /rejected        mean sequence log-probability, nats
    mi_lower_bound                 nats
    rejected_weight/mean, /max     size of the loss's derivative by a rejected log-probability
    rejected_weight/underflowed    share of rejected sequences whose weight is zero in float32
    rejected_weight/capped         share whose weight is at the cap
    scored_tokens                  in the batch, over all processes

    Those that need the chosen reference are left out where it was skipped.
    """
    total = sums.sum(0).tolist()
    chosen, rejected = max(total[0], 1.0), max(total[1], 1.0)
    values = {
        "rewards/chosen": total[2] / chosen,
        "rewards/rejected": total[3] / rejected,
        "rewards/accuracies": total[4] / chosen,
        "rewards/margins": total[5] / chosen,
        "logps/chosen": total[6] / chosen,
        "logps/rejected": total[7] / rejected,
        "mi_lower_bound": total[8] / ((total[0] + total[1]) / 2),
        "rejected_weight/mean": total[9] / rejected,
        "rejected_weight/max": float(sums[:, 13].max()),
        "rejected_weight/underflowed": total[10] / rejected,
        "rejected_weight/capped": total[11] / rejected,
        "scored_tokens": total[12],
    }
    if total[2] != total[2]:
        del values["rewards/accuracies"]  # a comparison with NaN is not NaN
    return {name: value for name, value in values.items() if value == value}
