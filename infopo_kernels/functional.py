"""The public functions: check -> rows -> op -> output."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from infopo_kernels import checks, ops
from infopo_kernels.objective import sequence_objective
from infopo_kernels.options import IGNORE_INDEX, InfoPOOptions, KernelOptions, LogitOptions
from infopo_kernels.packing import Rows, default_is_chosen, row_segments, sequence_sums, to_rows

Reduction = Literal["none", "sum", "mean"]


class InfoPOOutput(NamedTuple):
    """The loss and what one logs. Everything but `loss` is without gradient.

    S is the number of sequences, in the order of the call.
    """

    loss: Tensor
    """[] float32 (float64 for float64 inputs), nats per pair; differentiable."""
    mi_lower_bound: Tensor
    """[] float64, nats: the NWJ estimate of the mutual information, ``-loss`` without the SFT term.
    NaN if the chosen reference was skipped: the bound is shifted by an unknown constant then."""
    logps: Tensor
    """[S] float64, nats: sequence log-probabilities (means over scored tokens with `average`)."""
    ref_logps: Tensor
    """[S] float64, nats: the reference's; 0 without a reference, NaN for chosen sequences that were skipped."""
    rewards: Tensor
    """[S] float64: ``beta * (logps - ref_logps)``; NaN for chosen sequences whose reference was skipped."""
    weights: Tensor
    """[S] float64: size of the loss's derivative by the sequence's log-probability, times the number of pairs:
    `beta` for chosen, ``beta * exp(min(reward - offset, max_log_weight))`` for rejected sequences."""
    scored_tokens: Tensor
    """[S] int64."""
    is_chosen: Tensor
    """[S] bool."""
    chosen_reference_skipped: bool
    """True if the chosen reference was left out: gradients are exact, the loss is shifted by a constant,
    ``beta / num_pairs`` times the sum of the chosen references."""

    @property
    def chosen_logps(self) -> Tensor:
        """`logps` of the chosen sequences."""
        return self.logps[self.is_chosen]

    @property
    def rejected_logps(self) -> Tensor:
        """`logps` of the rejected sequences."""
        return self.logps[~self.is_chosen]

    @property
    def chosen_rewards(self) -> Tensor:
        """`rewards` of the chosen sequences."""
        return self.rewards[self.is_chosen]

    @property
    def rejected_rewards(self) -> Tensor:
        """`rewards` of the rejected sequences."""
        return self.rewards[~self.is_chosen]

    @property
    def rejected_weights(self) -> Tensor:
        """`weights` of the rejected sequences."""
        return self.weights[~self.is_chosen]


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What autocast does to the inputs of a linear layer: all in its type, float64 left alone."""
    kind = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype) for t in tensors
    )


def _checked_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    shift: bool,
    ignore_index: int,
    prefix: str = "",
) -> tuple[Rows, Tensor, Tensor | None]:
    """Rows, and weight and bias as the ops take them."""
    for name, value in ((f"{prefix}hidden", hidden), (f"{prefix}weight", weight)):
        checks.tensor(name, value)
    cast_hidden, cast_weight, cast_bias = _autocast(hidden, weight, bias)
    assert cast_hidden is not None
    assert cast_weight is not None
    checks.head(cast_hidden, cast_weight, cast_bias, prefix=prefix)
    checks.layout(cast_hidden, labels, cu_seqlens, ignore_index)
    checks.flag("shift", shift)
    if cu_seqlens is not None:
        ops.row_segments(cu_seqlens, labels.numel())  # for its check of the bounds, before anything relies on them
    return to_rows(cast_hidden, labels, cu_seqlens, shift=shift, ignore_index=ignore_index), cast_weight, cast_bias


def _token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    shift: bool,
    ignore_index: int,
    logit: LogitOptions,
    kernel: KernelOptions,
    prefix: str = "",
) -> tuple[Tensor, Rows]:
    """Token log-probabilities [N] of a batch in either layout, and its rows."""
    rows, weight, bias = _checked_rows(hidden, weight, bias, labels, cu_seqlens, shift, ignore_index, prefix)
    logp, _ = ops.logprob(
        rows.hidden, weight, bias, rows.labels, logit.softcap, logit.scale, kernel.backend, kernel.workspace_mib
    )
    return logp, rows


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
) -> Tensor:
    """Log-probabilities of labels under a language-model head, differentiable, without the logits in memory.

    Equivalent to::

        z = logit_scale * softcap_fn(hidden @ weight.T + bias) / temperature      # [N, V], float32
        logps = z.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)    # 0 where labels == ignore_index
        logps                                                      # reduction="none"
        logps.double().sum(-1)                                     # reduction="sum", per sequence
        logps.double().sum(-1) / (labels != ignore_index).sum(-1)  # reduction="mean", per sequence

    with ``softcap_fn(a) = softcap * tanh(a / softcap)``. Two passes: the backward recomputes logits tile by tile (one
    product forward, three backward).

    Args:
        hidden: hidden states that enter the head; [S, T, H] padded, or [N, H] or [1, N, H] packed. float32, bfloat16,
            float16 (float64 on the "torch" backend). Under autocast, hidden, weight and bias are cast as by a linear
            layer.
        weight: [V, H], type and device of `hidden`; may be tied to the embedding.
        labels: [S, T], [N] or [1, N], integers in [0, V) or `ignore_index`. Rows with `ignore_index` are compacted
            away before any product.
        bias: [V] or None.
        cu_seqlens: [S + 1] int32 or int64, bounds of packed sequences; needed for "sum" and "mean" of packed rows.
        shift: score each row on the label of the next one, so that `labels` may be the input ids. Within packed rows
            the shift stays inside each sequence. Hidden states are not copied for it.
        reduction: "none", "sum" or "mean" over the scored tokens of each sequence.
        ignore_index: label of rows that are not scored.
        softcap: softcap c, or None.
        logit_scale: s.
        temperature: τ.
        backend: "auto", "cpp", "triton" or "torch".
        workspace_mib: bound, MiB, on memory beyond the results; None for 32 on a CPU and 256 on a GPU.

    Returns:
        "none": the shape of `labels`, float32 (float64 for float64 inputs), nats, 0 where not scored; with `shift`,
        entry t belongs to label t + 1 and the last of each sequence is 0. "sum", "mean": [S] float64, nats: at 10^5
        tokens float32 could not hold a sum to better than 0.008.

    Raises:
        ValueError, TypeError: see `infopo_kernels.checks`; names the argument, what was expected and what came. On a
            GPU label values are not checked (the host would wait for the device): a label outside [0, V) gives NaN.
    """
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"`reduction` must be 'none', 'sum' or 'mean', got {reduction!r}.")
    logit = LogitOptions(softcap, logit_scale, temperature)
    kernel = KernelOptions(backend, workspace_mib)
    logp, rows = _token_logps(hidden, weight, bias, labels, cu_seqlens, shift, ignore_index, logit, kernel)
    if reduction == "none":
        return logp.reshape(labels.shape)
    if rows.cu_seqlens is None:
        raise ValueError(
            f"`cu_seqlens` is missing: reduction={reduction!r} of packed `hidden` [N, H] needs the bounds [S + 1] of "
            f"its sequences."
        )
    S = len(rows.cu_seqlens) - 1
    segments = row_segments(rows.cu_seqlens, len(rows.labels))
    counts = ops.scored_tokens(rows.labels, segments, S)
    sums = sequence_sums(logp, segments, S)
    return sums if reduction == "sum" else sums / counts


def linear_infopo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    is_chosen: Tensor | None = None,
    num_pairs: float | None = None,
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
) -> InfoPOOutput:
    """The InfoPO loss from hidden states, head and labels, with its gradients, without the logits in memory.

    Equivalent, for a padded batch of B pairs (chosen first), to::

        logps = linear_logps(hidden, weight, labels, bias=bias, reduction="mean" if average else "sum")     # [2B]
        reward = beta * (logps - ref_logps)
        loss = (-reward[:B] + torch.exp(reward[B:] - offset)).mean()
        loss = loss + sft_weight * (-linear_logps(..., reduction="mean")[:B]).mean()

    with the exponential continued by its tangent above `max_log_weight`. The loss is a sum over sequences, not over
    pairs: chosen and rejected sequences may come in different calls, in any order and in unequal numbers, as long as
    every call is given the same `num_pairs`.

    The gradients are formed in the forward pass, so that one tile of logits serves both; the backward pass multiplies
    them by the gradient that comes from above, once. Which rows take how many products: `infopo_kernels.schedule`.

    Args:
        hidden: [2B, T, H] padded, the first B sequences chosen, the last B rejected; or [N, H] or [1, N, H] packed.
            float32, bfloat16, float16 (float64 on the "torch" backend). Cast under autocast as by a linear layer.
        weight: [V, H], type and device of `hidden`; may be tied to the embedding.
        labels: [2B, T], [N] or [1, N], integers in [0, V) or `ignore_index` for prompt and padding.
        bias: [V] or None.
        cu_seqlens: [S + 1] int32 or int64, bounds of packed sequences.
        is_chosen: [S] bool, which sequences are chosen. Needed when packed; padded, it replaces "chosen first".
        num_pairs: number of pairs that the loss is averaged over; None counts each sequence of the call as half a
            pair (S / 2). Give the global number when halves come in different calls.
        ref_logps: [S] reference log-probabilities in nats, in the reduction that `average` says; best float64. With
            `skip_chosen_reference`, chosen entries are ignored and a padded batch may pass the B rejected ones alone.
        ref_hidden: the reference's hidden states in the layout of `hidden`, from which its log-probabilities are formed
            without gradient by the same kernel. With `skip_chosen_reference` a padded batch may pass the rejected half
            [B, T, H] alone.
        ref_weight: [V, H] head of the reference; needed with `ref_hidden` (for a shared frozen head pass `weight`).
        ref_bias: [V] or None.
        skip_chosen_reference: leave the chosen reference out. It has no gradient and no influence on one; the loss
            value is shifted by a constant, and the output says so.
        beta, offset, max_log_weight, min_log_weight, sft_weight, average: see `InfoPOOptions`.
        shift: score each row on the label of the next one (see `linear_logps`).
        ignore_index: label of rows that are not scored.
        softcap, logit_scale, temperature: see `LogitOptions`; the reference's logits take the same.
        backend: "auto", "cpp", "triton" or "torch".
        workspace_mib: bound, MiB, on memory beyond results and gradients; None for 32 on a CPU and 256 on a GPU.

    Returns:
        `InfoPOOutput`; only `loss` has a gradient. To put the log-probabilities into another loss, use `linear_logps`.

    Raises:
        ValueError, TypeError: see `infopo_kernels.checks`. On a GPU values (labels, bounds, references) are not
            checked, since the host would wait for the device: they make the loss NaN.
        RuntimeError: backward() a second time through the same loss, or with create_graph=True.

    Source: Xiao et al., NAACL 2025; equations in `infopo_kernels.objective`.
    """
    options = InfoPOOptions(beta, offset, max_log_weight, min_log_weight, sft_weight, average)
    logit = LogitOptions(softcap, logit_scale, temperature)
    kernel = KernelOptions(backend, workspace_mib)
    checks.flag("skip_chosen_reference", skip_chosen_reference)
    rows, weight, bias = _checked_rows(hidden, weight, bias, labels, cu_seqlens, shift, ignore_index)
    S = checks.pairs(labels, cu_seqlens, is_chosen, num_pairs)
    assert rows.cu_seqlens is not None
    chosen_first = is_chosen is None
    if is_chosen is None:
        is_chosen = default_is_chosen(S, hidden.device)
    if ref_hidden is not None:
        if ref_logps is not None:
            raise ValueError("`ref_logps` and `ref_hidden` were both given; pass one of them.")
        if ref_weight is None:
            raise ValueError(
                "`ref_weight` is missing: `ref_hidden` needs the reference's head; if the policy's head is frozen and "
                "shared, pass `ref_weight=weight`."
            )
        checks.tensor("ref_hidden", ref_hidden)
        rejected_only = skip_chosen_reference and chosen_first and ref_hidden.shape[:-1] == labels[S // 2 :].shape
        ref_logps = _reference_logps(
            ref_hidden, ref_weight, ref_bias, labels, cu_seqlens, is_chosen, rejected_only, skip_chosen_reference,
            average, shift, ignore_index, logit, kernel,
        )  # fmt: skip
    elif ref_weight is not None or ref_bias is not None:
        given = "ref_weight" if ref_weight is not None else "ref_bias"
        raise ValueError(f"`{given}` was given without `ref_hidden`; pass the reference's hidden states too.")
    elif ref_logps is not None:
        rejected_only = skip_chosen_reference and chosen_first and ref_logps.shape == (S // 2,)
        expected, meaning = (S // 2, "rejected only") if rejected_only else (S, "one for each sequence")
        checks.reference_logps("ref_logps", ref_logps, expected, meaning, hidden.device)
        ref_logps = ref_logps.detach().to(torch.float64)
        if rejected_only:
            ref_logps = torch.cat([torch.zeros_like(ref_logps), ref_logps])
    elif skip_chosen_reference:
        raise ValueError(
            "`skip_chosen_reference=True` goes with `ref_logps` or `ref_hidden`; without either the loss is "
            "reference-free already."
        )
    else:
        ref_logps = torch.zeros(S, dtype=torch.float64, device=hidden.device)
    known_ref = torch.where(is_chosen, 0.0, ref_logps) if skip_chosen_reference else ref_logps

    grad = torch.is_grad_enabled()
    wanted = [grad and t is not None and t.requires_grad for t in (rows.hidden, weight, bias)]
    loss, bound, logps, rewards, weights, counts, *_ = ops.linear_infopo(
        rows.hidden, weight, bias, rows.labels, rows.cu_seqlens, is_chosen, known_ref, logit.softcap, logit.scale,
        options.beta, options.offset, options.max_log_weight, options.min_log_weight, options.sft_weight,
        options.average, S / 2 if num_pairs is None else float(num_pairs), wanted, kernel.backend, kernel.workspace_mib,
    )  # fmt: skip
    if skip_chosen_reference:
        unknown = torch.where(is_chosen, torch.nan, 0.0).to(torch.float64)
        bound, rewards, known_ref = torch.full_like(bound, torch.nan), rewards + unknown, known_ref + unknown
    return InfoPOOutput(loss, bound, logps, known_ref, rewards, weights, counts, is_chosen, skip_chosen_reference)


def _reference_logps(
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    is_chosen: Tensor,
    rejected_only: bool,
    skip_chosen: bool,
    average: bool,
    shift: bool,
    ignore_index: int,
    logit: LogitOptions,
    kernel: KernelOptions,
) -> Tensor:
    """[S] float64 sequence log-probabilities of the reference without gradient; 0 for chosen ones that are skipped."""
    if rejected_only:
        labels, is_chosen = labels[len(labels) // 2 :], is_chosen[len(labels) // 2 :]
    elif skip_chosen:
        rows_chosen = is_chosen[:, None] if cu_seqlens is None else is_chosen[_segments(cu_seqlens, labels)]
        labels = labels.masked_fill(rows_chosen, ignore_index)
    if ref_hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"`ref_hidden` must have shape {[*labels.shape, 'H']}, the layout of `hidden`, got "
            f"{list(ref_hidden.shape)}."
        )
    with torch.no_grad():
        logp, rows = _token_logps(
            ref_hidden, ref_weight, ref_bias, labels, cu_seqlens, shift, ignore_index, logit, kernel, prefix="ref_"
        )
        assert rows.cu_seqlens is not None
        segments, S = row_segments(rows.cu_seqlens, len(rows.labels)), len(is_chosen)
        logps = sequence_sums(logp, segments, S)
        if average:
            logps = logps / sequence_sums(rows.labels.ne(IGNORE_INDEX), segments, S).clamp(min=1)
        return torch.cat([torch.zeros_like(logps), logps]) if rejected_only else logps


def _segments(cu_seqlens: Tensor, labels: Tensor) -> Tensor:
    """Sequence of each packed row, in the shape of the labels."""
    return row_segments(cu_seqlens, labels.numel()).reshape(labels.shape)


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
            keeps sums of long sequences); differentiable, any number of times. P and Q may differ.
        ref_chosen_logps, ref_rejected_logps: [P], [Q] of the reference; both None for a reference-free loss; only
            `ref_chosen_logps` None skips the chosen reference (gradients exact, loss shifted, the output says so).
            With `average`, means over the tokens.
        chosen_lengths, rejected_lengths: [P], [Q] scored tokens of each sequence; needed with `average` (which
            divides the sums by them) and, for the chosen ones, with `sft_weight`.
        num_pairs: number of pairs that the loss is averaged over; None takes (P + Q) / 2.
        beta, offset, max_log_weight, min_log_weight, sft_weight, average: see `InfoPOOptions`.

    Returns:
        `InfoPOOutput`, chosen sequences first; `scored_tokens` is 0 where no lengths were given.

    Raises:
        ValueError, TypeError: a shape, type, device or option is wrong; the message names it.
    """
    options = InfoPOOptions(beta, offset, max_log_weight, min_log_weight, sft_weight, average)
    halves = (
        ("chosen", chosen_logps, ref_chosen_logps, chosen_lengths),
        ("rejected", rejected_logps, ref_rejected_logps, rejected_lengths),
    )
    device = checks.tensor("chosen_logps", chosen_logps).device
    logps, refs, lengths = [], [], []
    for half, own, reference, length in halves:
        checks.tensor(f"{half}_logps", own)
        if own.ndim != 1:
            raise ValueError(
                f"`{half}_logps` must have shape [P], one log-probability for each sequence, got {list(own.shape)}; "
                f"sum token log-probabilities first."
            )
        checks.reference_logps(f"{half}_logps", own, len(own), "one for each sequence", device)
        if reference is not None:
            meaning = f"one for each of `{half}_logps`"
            checks.reference_logps(f"ref_{half}_logps", reference, len(own), meaning, device)
        needed = options.average or (options.sft_weight > 0 and half == "chosen")
        if length is None and needed:
            why = "average=True" if options.average else "sft_weight > 0"
            raise ValueError(f"`{half}_lengths` is missing: {why} needs the number of scored tokens of each sequence.")
        if length is not None and (length.shape != own.shape or length.is_floating_point()):
            raise ValueError(
                f"`{half}_lengths` must hold {len(own)} integers, one for each of `{half}_logps`, got "
                f"{list(length.shape)} of {length.dtype}."
            )
        if length is not None and needed and (length < 1).any():
            raise ValueError(
                f"`{half}_lengths` must be at least 1, got {int(length.min())}; drop sequences without a scored token."
            )
        logps.append(own.to(torch.float64))
        zeros = torch.zeros(len(own), dtype=torch.float64, device=device)
        refs.append(zeros if reference is None else reference.detach().to(torch.float64))
        lengths.append(zeros.to(torch.int64) if length is None else length.to(torch.int64))
    if ref_rejected_logps is None and ref_chosen_logps is not None:
        raise ValueError("`ref_rejected_logps` is missing: pass both references, only the rejected one, or neither.")
    S = len(chosen_logps) + len(rejected_logps)
    if S == 0:
        raise ValueError("`chosen_logps` and `rejected_logps` are both empty; pass at least one sequence.")
    if num_pairs is None:
        num_pairs = S / 2
    elif not 0 < num_pairs < float("inf"):
        raise ValueError(f"`num_pairs` must be positive and finite, got {num_pairs}.")
    skipped = ref_chosen_logps is None and ref_rejected_logps is not None
    counts, ref_logps = torch.cat(lengths), torch.cat(refs)
    is_chosen = torch.arange(S, device=device) < len(chosen_logps)
    each = sequence_objective(torch.cat(logps), counts.clamp(min=1), is_chosen, ref_logps, options)
    total = each.terms.sum() / num_pairs
    loss = total + each.sft_terms.sum() / num_pairs
    bound, rewards = -total.detach(), each.rewards.detach()
    if skipped:
        unknown = torch.where(is_chosen, torch.nan, 0.0).to(torch.float64)
        bound, rewards, ref_logps = torch.full_like(bound, torch.nan), rewards + unknown, ref_logps + unknown
    dtype = torch.float64 if chosen_logps.dtype == torch.float64 else torch.float32
    return InfoPOOutput(
        loss.to(dtype), bound, each.logps.detach(), ref_logps, rewards, each.weights, counts, is_chosen, skipped
    )
