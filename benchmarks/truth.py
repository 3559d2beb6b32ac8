"""Right values by plain PyTorch, a bounded number of rows at a time, and the check that every contender must pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from benchmarks.cases import Batch
from benchmarks.contenders import Contender
from infopo_kernels.options import IGNORE_INDEX

_ROWS: Final = 256

GRADIENT_TOLERANCE: Final = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""Allowed |error| / |truth| of a gradient: some ten times the error of naive PyTorch in the type, and far below that
of a wrong label, factor or half."""

LOSS_TOLERANCE: Final = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
"""Allowed error of the loss, as a share of its largest term."""


@dataclass
class Truth:
    """Loss, token log-probabilities [N], and gradients by name."""

    loss: Tensor
    token_logps: Tensor
    gradients: dict[str, Tensor]


def truth(batch: Batch, dtype: torch.dtype) -> Truth:
    """The values of `batch` with all arithmetic in `dtype`."""
    hidden, labels = batch.rows
    hidden, weight = hidden.detach(), batch.weight.detach().to(dtype)
    logps = torch.zeros(len(labels), dtype=dtype, device=labels.device)
    scored = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    chunks = torch.split(scored, _ROWS)
    for rows in chunks:
        z = hidden[rows].to(dtype) @ weight.T
        logps[rows] = z.gather(1, labels[rows, None]).squeeze(1) - z.logsumexp(1)
    logps.requires_grad_()
    loss = batch.loss(batch.sequence_means(logps))
    gradients = {}
    if batch.case.trained:
        (row_weight,) = torch.autograd.grad(loss, logps)
        dX = torch.zeros_like(hidden, dtype=dtype)
        dW = torch.zeros_like(weight) if "weight" in batch.case.trained else None
        for rows in chunks:
            # d l_t / d z = onehot - softmax
            G = (hidden[rows].to(dtype) @ weight.T).softmax(1).neg_()
            G[torch.arange(len(rows), device=G.device), labels[rows]] += 1
            G *= row_weight[rows, None]
            dX[rows] = G @ weight
            if dW is not None:
                dW.addmm_(G.T, hidden[rows].to(dtype))
        gradients["hidden"] = dX.view(batch.hidden.shape)
        if dW is not None:
            gradients["weight"] = dW
    return Truth(loss.detach(), logps.detach(), gradients)


def relative_error(got: Tensor, right: Tensor) -> float:
    """|got - right| / |right|, a bounded part at a time."""
    error = size = 0.0
    for a, b in zip(*(torch.split(x.detach().flatten(), 1 << 20) for x in (got, right)), strict=True):
        difference = a.to(b.dtype) - b
        error += float(torch.dot(difference, difference))
        size += float(torch.dot(b, b))
    return float((error / size) ** 0.5) if size else float(error > 0)


def run(contender: Contender, batch: Batch) -> Tensor:
    """What is timed: the loss, and its gradients where the case has any."""
    batch.clear()
    if not batch.case.trained:
        with torch.no_grad():
            return contender.loss(batch)
    loss = contender.loss(batch)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def check(contender: Contender, batch: Batch, right: Truth) -> str | None:
    """Run once; None if the values are right, else what is wrong."""
    dtype = batch.hidden.dtype
    loss = run(contender, batch)
    size = max(abs(float(right.loss)), batch.beta * float(right.token_logps.abs().max()))
    error = abs(float(loss) - float(right.loss))
    if not error <= LOSS_TOLERANCE[dtype] * size:
        return f"wrong loss: {float(loss):.6g} instead of {float(right.loss):.6g}"
    for name in ("hidden", "weight"):
        got, expected = getattr(batch, name).grad, right.gradients.get(name)
        if (got is None) != (expected is None):
            return f"the gradient of {name} is {'missing' if got is None else 'there, though it is frozen'}"
        if got is None or expected is None:
            continue
        error = relative_error(got, expected)
        if not error <= GRADIENT_TOLERANCE[dtype]:
            return f"wrong gradient of {name}: off by {error:.2g} of its norm"
    return None
