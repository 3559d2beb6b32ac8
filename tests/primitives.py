"""The truth of the three primitives: the results of plain PyTorch for a head, labels and row weights, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from infopo_kernels.backends.base import Head
from infopo_kernels.options import ELSEWHERE, IGNORE_INDEX


@dataclass
class Plain:
    """l and lse [N], 0 where a row is not scored, and the gradients of sum_t c_t l_t; float64."""

    l: Tensor  # noqa: E741
    lse: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor


def plain(head: Head, labels: Tensor, c: Tensor) -> Plain:
    """Computes them with autograd, from the scored rows alone: the other rows may hold anything."""
    scored = labels != IGNORE_INDEX
    x = head.hidden.detach()[scored].double().requires_grad_()
    w = head.weight.detach().double().requires_grad_()
    b = (torch.zeros(len(w)) if head.bias is None else head.bias.detach()).double().requires_grad_()
    a = x @ w.T + b
    z = head.scale * (a if head.softcap is None else head.softcap * torch.tanh(a / head.softcap))
    lse = z.logsumexp(1)
    here = labels[scored] != ELSEWHERE  # the logit of a label in another part of the vocabulary counts as 0
    picked = torch.where(here, z.gather(1, labels[scored].where(here, 0)[:, None]).squeeze(1), 0.0)
    # the gradient of c (z_y - lse), without forming that product: 0 times -inf would be NaN
    weights = c[scored].double()
    torch.autograd.backward([picked, lse], [weights, -weights])
    assert x.grad is not None
    assert w.grad is not None
    assert b.grad is not None

    def rows(values: Tensor) -> Tensor:
        full = torch.zeros(len(labels), *values.shape[1:], dtype=torch.float64)
        full[scored] = values.detach()
        return full

    return Plain(rows(picked - lse), rows(lse), rows(x.grad), w.grad, b.grad)
