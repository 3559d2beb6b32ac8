"""The public functions: check -> rows -> op -> output."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from infopo_kernels import checks, ops
from infopo_kernels.distributed import collectives
from infopo_kernels.distributed.parallel import Parallel, VocabShard
from infopo_kernels.distributed.sharded import local
from infopo_kernels.objectives import Evaluation, InfoPO, Objective, Sequences
from infopo_kernels.options import IGNORE_INDEX, KernelOptions, LogitOptions
from infopo_kernels.output import InfoPOOutput, PreferenceOutput, TailSummary
from infopo_kernels.packing import Rows, default_is_chosen, packed_rows, padded_rows, sequence_sums

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Reduction = Literal["none", "sum", "mean"]


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = False,
    reduction: Reduction = "none",
    ignore_index: int = IGNORE_INDEX,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    backend: str = "auto",
    workspace_mib: int | None = None,
    vocab: VocabShard | None = None,
    sequence_group: ProcessGroup | None = None,
    tail_threshold: float = 0.0,
    grad_weight_into: Tensor | None = None,
) -> Tensor:
    """Log-probabilities of labels under a language-model head: differentiable, without the logits in memory.

    Equivalent to::

        z = logit_scale * softcap_fn(hidden @ weight.T + bias) / temperature      # [N, V], float32
        logps = z.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)    # 0 where labels == ignore_index
        logps                                                      # reduction="none"
        logps.double().sum(-1)                                     # reduction="sum", per sequence
        logps.double().sum(-1) / (labels != ignore_index).sum(-1)  # reduction="mean", per sequence

    with ``softcap_fn(a) = softcap * tanh(a / softcap)``. The backward pass forms the logits again, tile by tile. The
    forward pass takes one product, the backward pass three.

    Args:
        hidden: hidden states that enter the head; [S, T, H] padded, or [N, H] or [1, N, H] packed. float32, bfloat16,
            float16 (float64 on the "torch" backend). Under autocast, hidden, weight and bias are cast as in a linear
            layer.
        weight: [V, H], type and device of `hidden`; may be tied to the embedding.
        labels: [S, T], [N] or [1, N], integers in [0, V) or `ignore_index`. Rows with `ignore_index` are removed before
            any product.
        bias: [V] or None.
        cu_seqlens: [S + 1] int32 or int64, bounds of packed sequences; needed for "sum" and "mean" of packed rows.
        shift: score each row on the label of the next row, so that `labels` may be the input ids. In packed rows the
            shift stays inside each sequence. The shift copies no hidden states.
        reduction: "none", "sum" or "mean" over the scored tokens of each sequence.
        ignore_index: label of rows that are not scored.
        softcap: softcap c, or None.
        logit_scale: s.
        temperature: τ.
        backend: "auto", "cpp", "triton" or "torch".
        workspace_mib: bound, in MiB, on memory beyond the results; None takes 32 on a CPU and 256 on a GPU.
        vocab: which part of the head this is, if the ranks of a group share it: `weight` and `bias` are the part then,
            and `labels` count from the start of the whole vocabulary. See `infopo_kernels.distributed.VocabShard`. A
            `weight` that is a DTensor cut along its vocabulary describes itself: `VocabShard.of(weight)`.
        sequence_group: the process group whose ranks hold parts of the same sequences (context parallelism): any rows
            of each, the same sequences in the same order. `labels` were shifted before the cut. "sum" and "mean" are
            of whole sequences, alike on all ranks; in the backward pass each rank forms the gradient of its rows, and
            dW adds up over the ranks. A rank may hold no scored row of a sequence, and with `cu_seqlens` no row at
            all. 16 bytes a sequence travel.
        tail_threshold: θ; words below this probability share a column of the gradient. 0 is exact (`KernelOptions`).
        grad_weight_into: [V, H] float32 (float64 for float64 inputs), contiguous: a gradient buffer of your own, as
            `weight.main_grad` of Megatron. Each backward pass adds dW to it, times the incoming gradient, and gives
            `weight` no gradient:
            ``grad_weight_into += torch.autograd.grad(loss, weight)[0].float()``, but summed and added in float32, never
            rounded to the type of `weight`, and without V * H numbers beside the buffer. Not with a head that ranks
            share; with `sequence_group` the buffers add up over the ranks. Ignored where no gradient is recorded.

    Returns:
        "none": the shape of `labels`, float32 (float64 for float64 inputs), nats, 0 where not scored. With `shift`,
        entry t belongs to label t + 1, and the last entry of each sequence is 0. "sum", "mean": [S] float64, nats; at
        10^5 tokens a float32 sum would be off by up to 0.008.

    Raises:
        ValueError, TypeError: see `infopo_kernels.checks`; the message names the argument, what was expected and what
            came. On a GPU label values are not checked, because the host would have to wait for the device: a label
            outside [0, V) gives NaN.
    """
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"`reduction` must be 'none', 'sum' or 'mean', got {reduction!r}.")
    logit = LogitOptions(softcap, logit_scale, temperature)
    kernel = KernelOptions(backend, workspace_mib, tail_threshold)
    parallel = Parallel.of(vocab, sequence_group, weight)
    layout = _Layout(cu_seqlens, None, shift, ignore_index, parts=sequence_group is not None)
    rows, weight, bias = _checked_rows(hidden, weight, bias, labels, layout, parallel)
    into = _checked_buffer(grad_weight_into, rows, weight, parallel)
    if reduction == "none":
        return ops.logprob(rows, weight, bias, logit, kernel, parallel, into).reshape(labels.shape)
    if rows.cu_seqlens is None or rows.segments is None:
        raise ValueError(
            f"`cu_seqlens` is missing: reduction={reduction!r} of packed `hidden` [N, H] needs the bounds [S + 1] of "
            f"its sequences."
        )
    S = rows.cu_seqlens.shape[0] - 1  # `len` would make it a constant of torch.export
    if parallel is None or not parallel.sequence_group:
        counts: Tensor = ops.scored_tokens(rows.labels, rows.segments, S)
    else:
        counts = _whole_counts(rows, S, parallel, (weight, bias), logit, {"reduction": reduction})
    sums = sequence_sums(ops.logprob(rows, weight, bias, logit, kernel, parallel, into), rows.segments, S)
    if parallel is not None:
        sums = parallel.whole_sequences(sums)
    if reduction == "mean":
        return sums / counts
    # A sequence without a scored token is an error on a CPU; elsewhere nobody has seen it, and its sum is not 0.
    return sums if sums.device.type == "cpu" else torch.masked_fill(sums, counts == 0, math.nan)


def linear_infopo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    is_chosen: Tensor | None = None,
    num_pairs: float | None = None,
    sequence_weights: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    skip_chosen_reference: bool = False,
    beta: float = 0.1,
    offset: float = 1.0,
    max_log_weight: float | None = None,
    min_log_weight: float | None = None,
    sft_weight: float = 0.0,
    average: bool = False,
    shift: bool = False,
    ignore_index: int = IGNORE_INDEX,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    backend: str = "auto",
    workspace_mib: int | None = None,
    vocab: VocabShard | None = None,
    sequence_group: ProcessGroup | None = None,
    data_group: ProcessGroup | None = None,
    tail_threshold: float = 0.0,
    report_tail: bool = False,
    grad_weight_into: Tensor | None = None,
) -> InfoPOOutput:
    """The InfoPO loss and its gradients from hidden states, head and labels, without the logits in memory.

    Equivalent, for a padded batch of B pairs (chosen first), to::

        logps = linear_logps(hidden, weight, labels, bias=bias, reduction="mean" if average else "sum")     # [2B]
        reward = beta * (logps - ref_logps)
        loss = (-reward[:B] + torch.exp(reward[B:] - offset)).mean()
        loss = loss + sft_weight * (-linear_logps(..., reduction="mean")[:B]).mean()

    Above `max_log_weight` the tangent of the exponential takes the place of the exponential. The loss is a sum over
    sequences, not over pairs: chosen and rejected sequences may come in different calls, in any order and in unequal
    numbers, if every call gets the same `num_pairs`.

    The forward pass forms the gradients too, so that one tile of logits serves both. The backward pass multiplies them
    once by the incoming gradient. `infopo_kernels.schedule` says which rows take how many products. float16 gradients
    are formed relative to a scale of their own (`infopo_kernels.lift`), so a GradScaler works as with plain PyTorch.

    Args:
        hidden: [2B, T, H] padded, the first B sequences chosen, the last B rejected; or [N, H] or [1, N, H] packed.
            float32, bfloat16, float16 (float64 on the "torch" backend). Cast under autocast as in a linear layer.
        weight: [V, H], type and device of `hidden`; may be tied to the embedding.
        labels: [2B, T], [N] or [1, N], integers in [0, V) or `ignore_index` for prompt and padding.
        bias: [V] or None.
        cu_seqlens: [S + 1] int32 or int64, bounds of packed sequences.
        is_chosen: [S] bool, which sequences are chosen. A packed batch needs it. In a padded batch it replaces the
            order "chosen first".
        num_pairs: number of pairs that the loss is averaged over; None counts each sequence of the call as half a
            pair (S / 2). Give the global number if the halves come in different calls.
        sequence_weights: [S] floating, not negative; multiplies term and weight of each sequence. For K rejected
            responses to a prompt of weight w, give w for the chosen sequence and w / K for each rejected one.
            `num_pairs` is required then: the number of prompts.
        ref_logps: [S] reference log-probabilities in nats, sums or means as `average` says; best float64. With
            `skip_chosen_reference`, chosen entries are ignored, and a padded batch may pass only the B rejected ones.
        ref_hidden: the reference's hidden states in the layout of `hidden`. The same kernel forms the reference's
            log-probabilities from them, without gradient. With `skip_chosen_reference` a padded batch may pass only the
            rejected half [B, T, H].
        ref_weight: [V, H] head of the reference; needed with `ref_hidden` (for a shared frozen head pass `weight`).
        ref_bias: [V] or None.
        skip_chosen_reference: leave the chosen reference out. No gradient depends on it. The loss value is shifted by a
            constant, and the output says so.
        beta, offset, max_log_weight, min_log_weight, sft_weight, average: see `InfoPO`.
        shift: score each row on the label of the next row (see `linear_logps`).
        ignore_index: label of rows that are not scored.
        softcap, logit_scale, temperature: see `LogitOptions`; they apply to the reference's logits too.
        backend: "auto", "cpp", "triton" or "torch".
        workspace_mib: bound, in MiB, on memory beyond results and gradients; None takes 32 on a CPU and 256 on a GPU.
        vocab: which part of the head this is, if the ranks of a group share it: `weight` and `bias` are the part then,
            and `labels` count from the start of the whole vocabulary. See `infopo_kernels.distributed.VocabShard`. A
            `weight` that is a DTensor cut along its vocabulary describes itself: `VocabShard.of(weight)`.
        sequence_group: the process group whose ranks hold parts of the same sequences, see `linear_logps`. Every rank
            gets the same output; the gradients of its rows are whole, and dW and db add up over the ranks. 16 bytes a
            sequence travel: its scored tokens and its log-probability (24 for InfoPO with a trained head).
        data_group: the process group over which a wrapper averages gradients (DDP, FSDP). `num_pairs` is then this
            rank's own number, and the averaged gradient is that of the loss over all pairs of the group, however many
            each rank has; so is the average of `loss`. The ranks of `sequence_group` may be among it: their gradients
            are scaled, so that the average over all ranks adds up the parts. The host waits for one number.
        tail_threshold: θ; words below this probability share a column of the gradient. 0 is exact (`KernelOptions`).
        report_tail: fill the output's `tail`.
        grad_weight_into: a gradient buffer of your own, to which each backward pass adds dW; see `linear_logps`. The
            forward pass then forms no gradient and the backward pass all of them, from logits of its own: four products
            for rows with a weight, one for the others, no V * H numbers between the passes, and as many backward passes
            as you like. Not with `report_tail`, whose figures would come too late.

    Returns:
        `InfoPOOutput`; only `loss` has a gradient. To put the log-probabilities into another loss, use `linear_logps`.

    Raises:
        ValueError, TypeError: see `infopo_kernels.checks`. On a GPU values (labels, bounds, references) are not
            checked, because the host would have to wait for the device: bad values make the loss NaN.
        RuntimeError: backward() runs a second time through the same loss (without `grad_weight_into`), or with
            create_graph=True.

    Source: Xiao et al., NAACL 2025; equations in `infopo_kernels.objectives.infopo`.
    """
    return _linear_preference(
        hidden,
        weight,
        bias,
        labels,
        InfoPO(beta, offset, max_log_weight, min_log_weight, sft_weight, average),
        _Layout(cu_seqlens, is_chosen, shift, ignore_index, parts=sequence_group is not None),
        _Shares(num_pairs, sequence_weights, data_group),
        _Reference(ref_logps, ref_hidden, ref_weight, ref_bias, skip_chosen_reference),
        LogitOptions(softcap, logit_scale, temperature),
        KernelOptions(backend, workspace_mib, tail_threshold, report_tail),
        Parallel.of(vocab, sequence_group, weight),
        grad_weight_into,
    )


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    objective: Objective,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    is_chosen: Tensor | None = None,
    num_pairs: float | None = None,
    sequence_weights: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    skip_chosen_reference: bool = False,
    shift: bool = False,
    ignore_index: int = IGNORE_INDEX,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    backend: str = "auto",
    workspace_mib: int | None = None,
    vocab: VocabShard | None = None,
    sequence_group: ProcessGroup | None = None,
    data_group: ProcessGroup | None = None,
    tail_threshold: float = 0.0,
    report_tail: bool = False,
    grad_weight_into: Tensor | None = None,
) -> PreferenceOutput:
    """A preference loss and its gradients from hidden states, head and labels, without the logits in memory.

    Equivalent, for a padded batch of B pairs (chosen first) and ``objective=DPO(beta)``, to::

        logps = linear_logps(hidden, weight, labels, bias=bias, reduction="sum")     # [2B]
        reward = beta * (logps - ref_logps)
        loss = -torch.nn.functional.logsigmoid(reward[:B] - reward[B:]).mean()

    The forward pass forms the gradients too. DPO, IPO and SimPO take four products of the head's size (three where the
    memory of the weight gradient can keep the logits, two with a frozen head). InfoPO takes three. SFT takes three for
    chosen rows and one for rejected rows. The table is in `infopo_kernels.schedule`.

    Args:
        hidden: [2B, T, H] padded, the first B sequences chosen, the last B rejected; or [N, H] or [1, N, H] packed.
            float32, bfloat16, float16 (float64 on the "torch" backend). Cast under autocast as in a linear layer.
        weight: [V, H], type and device of `hidden`; may be tied to the embedding.
        labels: [2B, T], [N] or [1, N], integers in [0, V) or `ignore_index` for prompt and padding.
        objective: ``InfoPO()``, ``DPO()``, ``IPO()``, ``SimPO()``, ``SFT()`` of `infopo_kernels.objectives` with their
            options, or your own. DPO, IPO and SimPO pair the i-th chosen sequence of the call with its i-th rejected
            one. InfoPO and SFT do not compare sequences, and take unequal numbers of them.
        bias: [V] or None.
        cu_seqlens: [S + 1] int32 or int64, bounds of packed sequences.
        is_chosen: [S] bool, which sequences are chosen. A packed batch needs it. In a padded batch it replaces the
            order "chosen first".
        num_pairs: number of pairs that the loss is averaged over; None counts each sequence of the call as half a
            pair (S / 2). Give the global number if parts of a batch come in different calls.
        sequence_weights: [S] floating, not negative; multiplies term and weight of each sequence. A pairwise objective
            takes the mean of a pair's two weights. `num_pairs` is required then. See `linear_infopo_loss`.
        ref_logps: [S] reference log-probabilities in nats, sums or means as the objective says (`average`); best
            float64. None for a reference-free loss. SimPO and SFT have no reference: leave it out.
        ref_hidden, ref_weight, ref_bias: the reference's hidden states and head instead; see `linear_infopo_loss`.
        skip_chosen_reference: leave the chosen reference out (InfoPO only); see `linear_infopo_loss`.
        shift: score each row on the label of the next row (see `linear_logps`).
        ignore_index: label of rows that are not scored.
        softcap, logit_scale, temperature: see `LogitOptions`; they apply to the reference's logits too.
        backend: "auto", "cpp", "triton" or "torch".
        workspace_mib: bound, in MiB, on memory beyond results and gradients; None takes 32 on a CPU and 256 on a GPU.
        vocab: which part of the head this is, if the ranks of a group share it: `weight` and `bias` are the part then,
            and `labels` count from the start of the whole vocabulary. See `infopo_kernels.distributed.VocabShard`. A
            `weight` that is a DTensor cut along its vocabulary describes itself: `VocabShard.of(weight)`.
        sequence_group: the process group whose ranks hold parts of the same sequences, see `linear_logps`. Every rank
            gets the same output; the gradients of its rows are whole, and dW and db add up over the ranks. 16 bytes a
            sequence travel: its scored tokens and its log-probability (24 for InfoPO with a trained head).
        data_group: the process group over which a wrapper averages gradients (DDP, FSDP). `num_pairs` is then this
            rank's own number, and the averaged gradient is that of the loss over all pairs of the group, however many
            each rank has; so is the average of `loss`. The ranks of `sequence_group` may be among it: their gradients
            are scaled, so that the average over all ranks adds up the parts. The host waits for one number.
        tail_threshold: θ; words below this probability share a column of the gradient. 0 is exact (`KernelOptions`).
        report_tail: fill the output's `tail`.
        grad_weight_into: a gradient buffer of your own, to which each backward pass adds dW; see `linear_infopo_loss`.

    Returns:
        `PreferenceOutput`; its documentation says what each field means for each objective. Only `loss` has a gradient.

    Raises:
        ValueError, TypeError: see `infopo_kernels.checks`. On a GPU values (labels, bounds, references, weights, and
            whether chosen and rejected sequences are equal in number) are not checked, because the host would have to
            wait for the device: bad values make the loss NaN.
        RuntimeError: backward() runs a second time through the same loss (without `grad_weight_into`), or with
            create_graph=True.

    Source: named in the objective's file in `infopo_kernels.objectives`.
    """
    return _linear_preference(
        hidden,
        weight,
        bias,
        labels,
        checks.objective(objective),
        _Layout(cu_seqlens, is_chosen, shift, ignore_index, parts=sequence_group is not None),
        _Shares(num_pairs, sequence_weights, data_group),
        _Reference(ref_logps, ref_hidden, ref_weight, ref_bias, skip_chosen_reference),
        LogitOptions(softcap, logit_scale, temperature),
        KernelOptions(backend, workspace_mib, tail_threshold, report_tail),
        Parallel.of(vocab, sequence_group, weight),
        grad_weight_into,
    )


def infopo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    num_pairs: float | None = None,
    beta: float = 0.1,
    offset: float = 1.0,
    max_log_weight: float | None = None,
    min_log_weight: float | None = None,
    sft_weight: float = 0.0,
    average: bool = False,
) -> InfoPOOutput:
    """The InfoPO loss on sequence log-probabilities that the caller already has.

    Equivalent to::

        chosen = beta * (chosen_logps - ref_chosen_logps)
        rejected = beta * (rejected_logps - ref_rejected_logps)
        loss = (-chosen.sum() + torch.exp(rejected - offset).sum()) / num_pairs

    Args:
        chosen_logps, rejected_logps: [P], [Q] sums of token log-probabilities, nats, any floating type (float64
            keeps sums of long sequences exact enough); differentiable, any number of times. P and Q may differ.
        ref_chosen_logps, ref_rejected_logps: [P], [Q] log-probabilities of the reference. Both None: a reference-free
            loss. Only `ref_chosen_logps` None: the chosen reference is skipped; gradients are exact, the loss is
            shifted, and the output says so. With `average` they are means over the tokens.
        chosen_lengths, rejected_lengths: [P], [Q] scored tokens of each sequence. `average` needs them, because it
            divides the sums by them; `sft_weight` needs those of the chosen sequences.
        num_pairs: number of pairs that the loss is averaged over; None takes (P + Q) / 2.
        beta, offset, max_log_weight, min_log_weight, sft_weight, average: see `InfoPO`.

    Returns:
        `InfoPOOutput`, chosen sequences first; `scored_tokens` is 0 where no lengths were given.

    Raises:
        ValueError, TypeError: a shape, type, device or option is wrong; the message names it.
    """
    objective = InfoPO(beta, offset, max_log_weight, min_log_weight, sft_weight, average)
    device = checks.tensor("chosen_logps", chosen_logps).device
    checks.infopo_logps("chosen", chosen_logps, ref_chosen_logps, chosen_lengths, objective, device)
    checks.infopo_logps("rejected", rejected_logps, ref_rejected_logps, rejected_lengths, objective, device)
    if ref_rejected_logps is None and ref_chosen_logps is not None:
        raise ValueError("`ref_rejected_logps` is missing: pass both references, only the rejected one, or neither.")
    P, S = len(chosen_logps), len(chosen_logps) + len(rejected_logps)
    if S == 0:
        raise ValueError("`chosen_logps` and `rejected_logps` are both empty; pass at least one sequence.")
    checks.number_of_pairs(num_pairs)

    def both(chosen: Tensor | None, rejected: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Chosen first, [S]; 0 for a half that was not given."""
        halves = ((chosen, P), (rejected, S - P))
        return torch.cat([torch.zeros(n, dtype=dtype, device=device) if x is None else x.to(dtype) for x, n in halves])

    is_chosen = torch.arange(S, device=device) < P
    sequences = Sequences(
        counts=both(chosen_lengths, rejected_lengths, torch.int64),
        is_chosen=is_chosen,
        ref_logps=both(ref_chosen_logps, ref_rejected_logps, torch.float64).detach(),
        num_pairs=S / 2 if num_pairs is None else num_pairs,
    )
    each = objective.terms(both(chosen_logps, rejected_logps, torch.float64), sequences)
    assert each.bound is not None
    output = InfoPOOutput(
        loss=(each.loss.sum() / sequences.num_pairs).to(_loss_dtype(chosen_logps)),
        mi_lower_bound=each.bound.sum() / sequences.num_pairs,
        logps=each.logps.detach(),
        ref_logps=sequences.ref_logps,
        rewards=each.rewards.detach(),
        weights=each.weights,
        scored_tokens=sequences.counts,
        is_chosen=is_chosen,
        chosen_reference_skipped=False,
    )
    skipped = ref_chosen_logps is None and ref_rejected_logps is not None
    return output.without_chosen_reference() if skipped else output


def _loss_dtype(logps: Tensor) -> torch.dtype:
    return torch.float64 if logps.dtype == torch.float64 else torch.float32


# --- from arguments to rows, and from rows to the output --------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """The caller's layout of the sequences."""

    cu_seqlens: Tensor | None
    is_chosen: Tensor | None
    shift: bool
    ignore_index: int
    parts: bool
    """Whether the rows are parts of the sequences."""


@dataclass(frozen=True)
class _Shares:
    """The factor and the divisor of each sequence's term."""

    num_pairs: float | None
    sequence_weights: Tensor | None
    data_group: ProcessGroup | None


@dataclass(frozen=True)
class _Reference:
    """The caller's arguments about the reference."""

    logps: Tensor | None
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    skip_chosen: bool


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The inputs as autocast casts those of a linear layer: all in its type; float64 stays as it is."""
    kind = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype) for t in tensors
    )


def _checked_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, parallel: Parallel | None, prefix: str = ""
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight and bias as the ops take them; `prefix` is "ref_" or ""."""
    if parallel is not None and parallel.shares_head:
        hidden, weight = local(f"{prefix}hidden", hidden), local(f"{prefix}weight", weight)
        bias = None if bias is None else local(f"{prefix}bias", bias)
    for name, value in ((f"{prefix}hidden", hidden), (f"{prefix}weight", weight)):
        checks.tensor(name, value)
    cast_hidden, cast_weight, cast_bias = _autocast(hidden, weight, bias)
    assert cast_hidden is not None
    assert cast_weight is not None
    part = parallel is not None and parallel.shares_head
    checks.head(cast_hidden, cast_weight, cast_bias, prefix=prefix, part=part)
    return cast_hidden, cast_weight, cast_bias


def _checked_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, layout: _Layout, parallel: Parallel | None
) -> tuple[Rows, Tensor, Tensor | None]:
    """Rows, and weight and bias as the ops take them. The sequence of each row is derived and checked once: here."""
    hidden, weight, bias = _checked_head(hidden, weight, bias, parallel)
    cu_seqlens, shift, ignore_index = layout.cu_seqlens, layout.shift, layout.ignore_index
    checks.layout(hidden, labels, cu_seqlens, ignore_index)
    checks.flag("shift", shift)
    if layout.parts and shift:
        raise ValueError(
            "`shift=True` does not go with `sequence_group`: the label of a part's last row lies on another rank. "
            "Shift before the cut: labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)."
        )
    if cu_seqlens is None and labels.ndim == 2:
        return padded_rows(hidden, labels, shift=shift, ignore_index=ignore_index), weight, bias
    segments = None if cu_seqlens is None else ops.row_segments(cu_seqlens, labels.numel(), layout.parts)
    rows = packed_rows(hidden, labels, cu_seqlens, segments, shift=shift, ignore_index=ignore_index, parts=layout.parts)
    return rows, weight, bias


def _checked_buffer(buffer: Tensor | None, rows: Rows, weight: Tensor, parallel: Parallel | None) -> Tensor | None:
    """`grad_weight_into`, checked; None where no gradient is recorded."""
    if buffer is None:
        return None
    if parallel is not None and parallel.shares_head:
        raise ValueError(
            "`grad_weight_into` must go with a head that this rank holds as a whole, got one that ranks share "
            "(`vocab`, or a DTensor `weight`); leave `grad_weight_into` out and add the gradient of `weight` yourself."
        )
    checks.weight_gradient_buffer(buffer, weight, rows.hidden)
    if not torch.is_grad_enabled():
        return None
    checks.trained_weight(weight)
    return buffer


def _whole_counts(
    rows: Rows,
    S: int,
    parallel: Parallel,
    head: tuple[Tensor, Tensor | None],
    logit: LogitOptions,
    same: dict[str, object],
    *values: Tensor | None,
) -> Tensor:
    """Scored tokens of sequences whose parts lie on several ranks, [S], after a comparison with the other ranks.

    `same`, and `values` (`is_chosen`, `ref_logps`, `sequence_weights`), are what they must pass alike.
    """
    assert rows.segments is not None
    trained = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (rows.hidden, *head)]
    same = {
        **same,
        "softcap, logit_scale or temperature": (logit.softcap, logit.logit_scale, logit.temperature),
        "requires_grad of hidden, weight, bias": trained,
    }
    vocabulary = 0 if parallel.vocab_group else head[0].shape[0]
    is_chosen, ref_logps, weights = values or (None, None, None)
    counts: Tensor = ops.shared_tokens(
        rows.labels, rows.segments, is_chosen, ref_logps, weights, vocabulary, S, parallel.sequence_group,
        "\n".join([f"{name}\t{value}" for name, value in same.items()]),  # torch.compile traces this
    )  # fmt: skip
    return counts


def _linear_preference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    objective: Objective,
    layout: _Layout,
    shares: _Shares,
    reference: _Reference,
    logit: LogitOptions,
    kernel: KernelOptions,
    parallel: Parallel | None,
    grad_weight_into: Tensor | None,
) -> PreferenceOutput:
    """`linear_preference_loss` with its options as objects."""
    if kernel.report_tail and parallel is not None and parallel.shares_head:
        raise ValueError(
            "`report_tail=True` was given with a head that ranks share (`vocab`, or a DTensor `weight`): each rank "
            "pools the tail of its own part, and no rank knows the whole; leave `report_tail` out."
        )
    if kernel.report_tail and grad_weight_into is not None:
        raise ValueError(
            "`report_tail=True` was given with `grad_weight_into`: the backward pass forms the gradients then, after "
            "the output has been made; leave one of them out."
        )
    rows, weight, bias = _checked_rows(hidden, weight, bias, labels, layout, parallel)
    into = _checked_buffer(grad_weight_into, rows, weight, parallel)
    S = checks.pairs(labels, layout.cu_seqlens, layout.is_chosen, shares.num_pairs, shares.sequence_weights, objective)
    checks.reference(
        objective, reference.logps, reference.hidden, reference.weight, reference.bias, reference.skip_chosen
    )
    assert rows.segments is not None
    is_chosen = default_is_chosen(S, hidden.device) if layout.is_chosen is None else layout.is_chosen
    weights = shares.sequence_weights
    num_pairs = S / 2 if shares.num_pairs is None else float(shares.num_pairs)
    if parallel is None or not parallel.sequence_group:
        counts = sequence_sums(rows.labels != IGNORE_INDEX, rows.segments, S)
    else:
        same = {
            "objective": (objective.name, *objective.to_flat()),
            "num_pairs": num_pairs,
            "skip_chosen_reference": reference.skip_chosen,
            "ref_hidden": reference.hidden is None,
        }
        counts = _whole_counts(rows, S, parallel, (weight, bias), logit, same, is_chosen, reference.logps, weights)
    num_pairs, parts = _over_ranks(num_pairs, shares.data_group, parallel, hidden.device)
    sequences = Sequences(
        counts=counts,
        is_chosen=is_chosen,
        ref_logps=torch.zeros(S, dtype=torch.float64, device=hidden.device),
        num_pairs=num_pairs,
        weights=None if weights is None else weights.detach().to(torch.float64),
    )
    if reference.logps is not None or reference.hidden is not None:
        chosen_first = layout.is_chosen is None
        ref_logps = _reference_logps(
            reference, rows, sequences, labels, chosen_first, objective, logit, kernel, parallel
        )
        sequences = replace(sequences, ref_logps=ref_logps)
    given = None if shares.num_pairs is None and shares.data_group is None else num_pairs
    result: ops.PreferenceResults | Evaluation
    if into is None:
        result = ops.linear_preference(rows, weight, bias, sequences, given, objective, logit, kernel, parallel)
    else:
        logp = ops.logprob(rows, weight, bias, logit, kernel, parallel, into)
        result = ops.objective_of_logps(logp, rows, sequences, given, objective, kernel, parallel)
    loss = result.loss
    if parts > 1:  # the value stays; the average over the parts of a sequence has to be their sum
        loss = loss + (parts - 1) * (loss - loss.detach())
    output = PreferenceOutput(
        loss=loss,
        mi_lower_bound=result.mi_lower_bound,
        logps=result.logps,
        ref_logps=sequences.ref_logps,
        rewards=result.rewards,
        weights=result.weights,
        scored_tokens=sequences.counts,
        is_chosen=is_chosen,
        chosen_reference_skipped=False,
        tail=TailSummary(*result.tail) if isinstance(result, ops.PreferenceResults) and kernel.report_tail else None,
    )
    return output.without_chosen_reference() if reference.skip_chosen else output


def _over_ranks(
    num_pairs: float, data_group: ProcessGroup | None, parallel: Parallel | None, device: torch.device
) -> tuple[float, int]:
    """Where a wrapper averages gradients: what the loss is divided by, and the factor of its gradient.

    The loss is a sum over sequences divided by the number P of all pairs. The average over R ranks of sums divided by
    P / R is that. Where a sequence's C parts lie among the R ranks, there are R / C times as many pairs, and each rank
    has a part of each gradient: their sum is C times the average.
    """
    if data_group is None:
        return num_pairs, 1
    name = collectives.name_of("data_group", data_group)
    sequence_group = "" if parallel is None else parallel.sequence_group
    parts = collectives.parts_within("data_group", name, sequence_group) if sequence_group else 1
    return collectives.average(name, num_pairs, device), parts


def _reference_logps(
    reference: _Reference,
    rows: Rows,
    sequences: Sequences,
    labels: Tensor,
    chosen_first: bool,
    objective: Objective,
    logit: LogitOptions,
    kernel: KernelOptions,
    parallel: Parallel | None,
) -> Tensor:
    """[S] float64 log-probabilities of the reference, as given or formed without gradient; 0 for skipped chosen ones.

    If the chosen reference is skipped, a padded batch with chosen first may give the rejected half alone.
    """
    S, skip = sequences.is_chosen.shape[0], reference.skip_chosen
    if reference.hidden is None:
        assert reference.logps is not None
        rejected_only = skip and chosen_first and reference.logps.shape == (S // 2,)
        expected, meaning = (S // 2, "rejected only") if rejected_only else (S, "one for each sequence")
        checks.reference_logps("ref_logps", reference.logps, expected, meaning, rows.labels.device)
        logps = reference.logps.detach().to(torch.float64)
        if rejected_only:
            logps = torch.cat([torch.zeros_like(logps), logps])
    else:
        assert reference.weight is not None
        assert rows.segments is not None
        hidden, weight, bias = _checked_head(
            reference.hidden, reference.weight, reference.bias, parallel, prefix="ref_"
        )
        rejected_only = skip and chosen_first and hidden.shape[:-1] == labels[S // 2 :].shape
        checks.reference_hidden(hidden, rows.hidden, labels[S // 2 :].shape if rejected_only else labels.shape)
        y = rows.labels
        if rejected_only:
            y = y[y.shape[0] // 2 :]
        elif skip:
            y = y.masked_fill(sequences.is_chosen[rows.segments], IGNORE_INDEX)
        with torch.no_grad():
            own = replace(rows, hidden=hidden.reshape(-1, hidden.shape[-1]), labels=y)
            logp = ops.logprob(own, weight, bias, logit, kernel, parallel)
            if rejected_only:
                logp = torch.cat([torch.zeros_like(logp), logp])
            logps = sequence_sums(logp, rows.segments, S)
            logps = logps if parallel is None else parallel.whole_sequences(logps)
            logps = logps / sequences.counts if objective.average else logps
    return torch.where(sequences.is_chosen, 0.0, logps) if skip else logps
