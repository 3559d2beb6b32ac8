"""The check that the policy equals the reference at the first step: every reward is 0, the bound is -exp(-offset).

Many faults of preference training raise no error, but this check shows them: another mode or type of the reference,
another checkpoint, other tokens, a stale file.
"""

from __future__ import annotations

import logging
from typing import Any, Final

import torch
from torch import Tensor

from infopo_kernels.output import PreferenceOutput

logger = logging.getLogger(__name__)

CAUSES: Final = (
    "dropout, NEFTune or router jitter is on in one of them (disable_dropout=False)",
    "the reference is another checkpoint than the one that training starts from (a model that was trained before it "
    "was handed over, an adapter that is not fresh and is switched off for the reference, PiSSA or OLoRA, which change "
    "the base)",
    "the reference has another type than the policy, or one of them runs under autocast and the other does not",
    "references computed ahead of time are of other weights, tokens, a chat template or a length limit, or means where "
    "sums are meant",
)


def bound(tokens: Tensor, logps: Tensor, dtype: torch.dtype) -> Tensor:
    """[S] float64, nats: how far two passes of one model may be apart in a sequence's log-probability.

    Each of the n tokens is off by some roundings of its logit, of either sign: 16 of the type's steps times sqrt(n),
    and at least 1e-3 nats, since batches are padded and multiplied in another order, and one part in a million of the
    sum.
    """
    step = torch.finfo(dtype).eps
    return (16 * step * tokens.double().sqrt()).clamp(min=1e-3) + 1e-6 * logps.abs()


def difference(output: PreferenceOutput, dtype: torch.dtype, average: bool) -> str | None:
    """A message if the log-ratios of a first step show that the policy is not the reference; else None.

    It reads values, and so waits for the device. It ignores sequences without a reference (NaN).
    """
    log_ratios = output.logps - output.ref_logps
    sums = output.logps * (output.scored_tokens if average else 1)
    allowed = bound(output.scored_tokens, sums, dtype) / (output.scored_tokens if average else 1)
    excess = torch.where(log_ratios.isnan(), 0.0, log_ratios.abs() / allowed)
    worst = int(excess.argmax())
    if float(excess[worst]) <= 1:
        return None
    return (
        f"At the first step the policy must be the reference: every reward 0, every log-ratio within "
        f"{float(allowed[worst]):.2g} nats ({dtype}, {int(output.scored_tokens[worst])} tokens). But sequence {worst} "
        f"has the log-ratio {float(log_ratios[worst]):+.4g} nats, and {int((excess > 1).sum())} of {len(excess)} "
        f"sequences are beyond their bound. Likely causes: "
        + "; ".join(f"({i}) {cause}" for i, cause in enumerate(CAUSES, 1))
        + "."
    )


def report(problem: str | None, strict: bool) -> None:
    """Warn, or with `strict` raise RuntimeError, if there is a problem."""
    if problem is None:
        return
    if strict:
        raise RuntimeError(problem)
    logger.warning("%s", problem)


def largest_step(model: Any, autocast: torch.dtype | None) -> torch.dtype:
    """The coarsest floating type that a forward of the model rounds to."""
    types = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize >= 2}
    types |= set() if autocast is None else {autocast}
    return max(types, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def other_type(model: Any, reference: Any) -> str | None:
    """A message if policy and reference have different types; else None."""
    ours, theirs = (_type_of_weights(each) for each in (model, reference))
    if ours == theirs:
        return None
    return (
        f"The policy's weights are {ours}, the reference's {theirs}: at equal weights their log-probabilities differ "
        f"by what the coarser type rounds away, in every log-ratio of the run. Load both with the same `dtype` (write "
        f"it out where it says 'auto')."
    )


def computing_type(model: Any, autocast: torch.dtype | None) -> torch.dtype:
    """The type in which a model computes: autocast's, else that of most of its weights."""
    return autocast or _type_of_weights(model)


def _type_of_weights(model: Any) -> torch.dtype:
    """The type of most of a model's weights; an adapter has few."""
    size: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            count = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves an empty tensor behind
            size[parameter.dtype] = size.get(parameter.dtype, 0) + count
    return max(size, key=lambda dtype: size[dtype])
