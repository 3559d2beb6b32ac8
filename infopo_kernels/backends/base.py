"""What a backend is: three primitives over rows, and the reason why it cannot run, if it cannot.

A backend knows rows, not losses; one that can evaluate an objective in a single launch says it with `objective`. With
X [N, H], W [V, H], b [V], labels y [N] and row weights c [N]:

    a_tv  = X_t . W_v + b_v
    z_tv  = scale * softcap * tanh(a_tv / softcap)          (scale * a_tv without a softcap)
    lse_t = logsumexp_v z_tv
    l_t   = z_{t,y_t} - lse_t                                the token log-probability, nats
    g_tv  = c_t * (1[v = y_t] - exp(z_tv - lse_t))           = d(sum_t c_t l_t) / d z_tv
    G_tv  = g_tv * scale * (1 - tanh(a_tv / softcap)^2)      = d(sum_t c_t l_t) / d a_tv
    dX    = G W        dW = G^T X        db = G^T 1

Contract, the same for every backend:

- A row whose label is `IGNORE_INDEX` is not scored: its l and lse are 0, its hidden state is never read, it costs no
  product, and its row of a gradient buffer is not touched.
- In `backward` a row with c = 0 is treated likewise. A NaN in c is not 0.
- Logits are formed and reduced in float32 (float64 for float64 inputs) whatever the input type, never rounded before
  the softmax. NaN or infinity in a row that is read makes that row's l NaN, never a plausible number.
- With a softcap an infinite a_tv is NaN: tanh would make a plausible number of it.
- Without a softcap a logit of -inf (from a bias of -inf) has probability 0, exactly. A label on it has l = -inf and
  finite gradients. A row whose logits are all -inf, or one of them +inf, has l and lse NaN.
- In gradients exp(z_tv - lse_t) is as exact as lse, |lse_t| 2^-24 relative, and never exceeds 1: lse is rounded, and z
  may be formed anew in another order of sums.
- A label outside [0, V) that is not `IGNORE_INDEX` never reads out of bounds; its l is NaN. (On a CPU the ops
  check labels before a backend sees them.)
- `gradients.hidden` rows are assigned; `gradients.weight` and `gradients.bias` are added to. Each is accumulated in
  float32 inside a call and rounded once on its way into a 16-bit buffer. `gradients.weight` has the weight's type or
  float32; `gradients.bias` is float32 (float64 for float64 inputs).
- hidden and weight may have any strides whose last one is 1; bias, labels, lse and c are contiguous.
- Beyond results and vectors of length N a call allocates at most `head.workspace_bytes`.
- The memory of a weight gradient that nothing has been added to may hold logits until then (`kept_rows`): rows whose
  weight is known only after their log-probability need no second product for their logits.
- Two runs with the same inputs on the same machine, with the same number of threads, are bitwise equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from infopo_kernels.objectives import Evaluation, Objective, Sequences
from infopo_kernels.packing import Rows


@dataclass(frozen=True)
class Head:
    """The LM head and the rows that enter it."""

    hidden: torch.Tensor
    """[N, H] float32, bfloat16, float16 (float64 where a backend supports it); last stride 1."""
    weight: torch.Tensor
    """[V, H], type and device of `hidden`; last stride 1."""
    bias: torch.Tensor | None
    """[V], type and device of `hidden`, contiguous; or None."""
    softcap: float | None
    """c of c * tanh(a / c), or None."""
    scale: float
    """logit scale / temperature."""
    workspace_bytes: int
    """Bound on what a call allocates beyond its results."""

    @property
    def accumulator_dtype(self) -> torch.dtype:
        """Type in which logits, log-probabilities and accumulators live."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Gradients:
    """Buffers that gradients are written to; None for one that is not wanted."""

    hidden: torch.Tensor | None
    """[N, H], type of `Head.hidden`, contiguous; rows are assigned."""
    weight: torch.Tensor | None
    """[V, H], type of `Head.weight` or float32, contiguous; added to."""
    bias: torch.Tensor | None
    """[V], float32 (float64 for float64 inputs), contiguous; added to."""


class Backend(Protocol):
    """The three primitives, and `objective`, which may decline.

    `labels` is [N] int64, `lse` and `row_weight` [N] in the accumulator type; contiguous.
    """

    name: ClassVar[str]

    def unsupported_reason(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None if inputs of this device and type can be served, else why not and what to do, as a sentence."""
        ...

    def kept_rows(self, head: Head, weight_gradient: torch.Tensor) -> int:
        """How many rows' logits the memory of `weight_gradient` [V, H] can hold; 0 where that does not pay.

        A gradient of the hidden states counts as wanted, whose float32 sums take part of the workspace.
        """
        ...

    def logprob(
        self, head: Head, labels: torch.Tensor, keep: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token log-probabilities l [N] and logsumexp [N]. One product.

        `keep` [V, H] is a weight gradient that nothing has been added to, and at most `kept_rows` rows are scored: it
        holds their logits afterwards, in a layout of the backend's own.
        """
        ...

    def logprob_and_grad(
        self, head: Head, labels: torch.Tensor, row_weight: torch.Tensor, gradients: Gradients
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`logprob`, and the gradients for row weights known beforehand, from the same logits.

        Two products if only `gradients.hidden` is wanted. Three if `gradients.weight` is wanted and is float32;
        where it is 16-bit, rounding once within the workspace may ask for a fourth.
        """
        ...

    def backward(
        self,
        head: Head,
        labels: torch.Tensor,
        lse: torch.Tensor,
        row_weight: torch.Tensor,
        gradients: Gradients,
        kept: torch.Tensor | None = None,
    ) -> None:
        """The gradients for row weights c and a known logsumexp. Three products (two if one buffer is None).

        `kept` [N] are the labels of the call of `logprob` that kept logits in `gradients.weight`: its scored rows are
        scored in `labels` too and cost one product less. `gradients.weight` is assigned then, not added to.
        """
        ...

    def scale_(self, values: torch.Tensor, factor: torch.Tensor) -> None:
        """values *= factor in place, each product in float32 (float64) and rounded once; bounded memory beside it.

        `factor` is one number [] for contiguous `values`, or [N] for the rows of `values` [N, H]. `scale_in_parts`
        does it for any backend.
        """
        ...

    def objective(
        self, objective: Objective, logp: torch.Tensor, rows: Rows, sequences: Sequences
    ) -> Evaluation | None:
        """Optional: what `infopo_kernels.objectives.evaluate` returns, in one launch; None to leave it to that.

        For a backend whose device takes longer to start the objective's some 20 small operations than to run them.
        """
        ...


def scale_in_parts(values: torch.Tensor, factor: torch.Tensor) -> None:
    """`Backend.scale_` in plain PyTorch, a bounded part at a time (a mixed product copies its operands)."""
    if not factor.ndim:
        values.mul_(factor)
        return
    step = max(1, (1 << 18) // values.shape[1])
    for part, own in zip(torch.split(values, step), torch.split(factor, step), strict=True):
        part.mul_(own[:, None])
