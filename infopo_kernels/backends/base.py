"""The contract of a backend: three primitives over rows, and a method that says why the backend cannot run.

A backend knows rows, not losses. If it can evaluate an objective in a single launch, it does so in `objective`. With
X [N, H], W [V, H], b [V], labels y [N] and row weights c [N]:

    a_tv  = X_t . W_v + b_v
    z_tv  = scale * softcap * tanh(a_tv / softcap)          (scale * a_tv without a softcap)
    lse_t = logsumexp_v z_tv
    l_t   = z_{t,y_t} - lse_t                                the token log-probability, nats
    g_tv  = c_t * (1[v = y_t] - exp(z_tv - lse_t))           = d(sum_t c_t l_t) / d z_tv
    G_tv  = g_tv * scale * (1 - tanh(a_tv / softcap)^2)      = d(sum_t c_t l_t) / d a_tv
    dX    = G W        dW = G^T X        db = G^T 1

With a threshold θ > 0 (`Head.tail_threshold`) the gradients pool what is small. Logits, l and lse stay exact. For a
chunk C of rows that get a gradient (c_t is not 0), a block B of consecutive words, and p_tv = exp(z_tv - lse_t):

    K       = { v in B : p_tv >= θ for some t in C, or v is the label of some t in C }         words that are kept
    T       = B without K                                                                       the tail
    pi_v    = sum_t p_tv / sum_{t, v' in T} p_tv'       for v in T: the chunk's mean tail       (0 if the sum is 0)
    gT_t    = sum_{v in T} G_tv                         all of the tail's gradient
    dX_t   += sum_{v in K} G_tv W_v + gT_t sum_{v in T} pi_v W_v
    dW_v   += sum_t G_tv X_t    for v in K;      pi_v sum_t gT_t X_t    for v in T              (db likewise)
    q_t    += sum_{v in T} p_tv                         the row's pooled probability

So rows of G still sum to what they sum to without a threshold. If δ_t = sum_{v in T} |p_tv - pi_v sum_{v' in T} p_tv'|,
the error of dX_t is at most |c_t scale| δ_t max_{v in T} |W_v - sum_{v' in T} pi_v' W_v'| for each block, without a
softcap. A backend chooses the chunks. It keeps all of B if K is more than `tail_exact_above` of B, because the exact
product is faster there, and if the lse of some row is NaN or -inf, so that a bad row spoils no other.
`logprob_and_grad` may keep all words where it forms dX alone: in one pass, without lse, the exact dX may be as fast.

Contract, the same for every backend:

- A row whose label is `IGNORE_INDEX` is not scored. Its l and lse are 0. It costs no product. The backend never reads
  its hidden state and never writes its row of a gradient buffer.
- `backward` treats a row with c = 0 in the same way. A NaN in c is not 0.
- Logits are formed and reduced in float32 (float64 for float64 inputs) for every input type. They are never rounded
  before the softmax. NaN or infinity in a row that is read makes that row's l NaN, never a plausible number.
- With a softcap, an infinite a_tv becomes NaN, because tanh would turn it into a plausible number.
- Without a softcap, a logit of -inf (from a bias of -inf) has probability exactly 0. A label with that logit has
  l = -inf and finite gradients. If one logit of a row is +inf, its l and lse are NaN. If all are -inf, its lse is -inf
  and its l NaN: in a part of a vocabulary, a word that counts nothing must not spoil the sum over the parts.
- In gradients, exp(z_tv - lse_t) is as exact as lse (a relative error of |lse_t| 2^-24) and never exceeds 1. It could
  exceed 1 otherwise: lse is rounded, and z may be formed again with another order of sums.
- A row whose label is `ELSEWHERE` has its label in another rank's part of the vocabulary: l = -lse, and g has no 1.
- Any other label outside [0, V) that is not `IGNORE_INDEX` never reads out of bounds; its l is NaN. (On a CPU the ops
  check labels before a backend sees them.)
- The backend assigns rows of `gradients.hidden`, and adds to `gradients.weight` and `gradients.bias`. Inside a call it
  accumulates each in float32, and rounds once when it writes to a 16-bit buffer. `gradients.weight` has the weight's
  type or float32; `gradients.bias` is float32 (float64 for float64 inputs).
- hidden and weight may have any strides, but the last stride is 1. bias, labels, lse and c are contiguous.
- Beyond results and vectors of length N, a call allocates at most `head.workspace_bytes`.
- While nothing has been added to a weight gradient, its memory may hold logits (`kept_rows`), and so may a part of the
  workspace. So rows whose weight depends on their log-probability need no second product for their logits. A backend
  whose products round G to 16 bits may keep 16-bit numbers, if they are relative to a reference near the largest logit.
- Two runs with the same inputs on the same machine, with the same number of threads, are bitwise equal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    """Bound on the memory that a call allocates beyond its results."""
    tail_threshold: float = 0.0
    """θ; 0 for exact gradients."""

    @property
    def accumulator_dtype(self) -> torch.dtype:
        """Type of logits, log-probabilities and accumulators."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class TailReport:
    """Buffers for what a call pooled."""

    mass: torch.Tensor
    """[N], accumulator type: q_t. A call assigns it for the rows that get a gradient. NaN before that."""
    columns: torch.Tensor
    """[2] float64: columns of G that were kept, and all columns. A call adds both numbers for each of its chunks."""

    @classmethod
    def empty(cls, head: Head) -> TailReport:
        """Before the first call."""
        N, device = len(head.hidden), head.hidden.device
        return cls(
            torch.full((N,), torch.nan, dtype=head.accumulator_dtype, device=device),
            torch.zeros(2, dtype=torch.float64, device=device),
        )

    def summary(self) -> torch.Tensor:
        """[3] float64: mean and maximum of q over the rows with a gradient, and the share of columns that were kept.

        0, 0 and 1 if nothing could be pooled. The host does not wait for the device.
        """
        rows = ~self.mass.isnan()
        mass = torch.where(rows, self.mass, 0).double()
        pooled = rows.any() & (self.columns[1] > 0)
        kept = torch.where(pooled, self.columns[0] / self.columns[1].clamp(min=1), 1.0)
        most = torch.cat([mass, mass.new_zeros(1)]).amax()
        return torch.stack([mass.sum() / rows.sum().clamp(min=1), most, kept])


@dataclass(frozen=True)
class Gradients:
    """Buffers for the gradients; None for a gradient that is not wanted."""

    hidden: torch.Tensor | None
    """[N, H], type of `Head.hidden`, contiguous; a call assigns rows."""
    weight: torch.Tensor | None
    """[V, H], type of `Head.weight` or float32, contiguous; a call adds to it."""
    bias: torch.Tensor | None
    """[V], float32 (float64 for float64 inputs), contiguous; a call adds to it."""
    tail: TailReport | None = None
    """Filled if it is given and `Head.tail_threshold` is not 0."""
    logits: torch.Tensor | None = None
    """Memory for logits that stay until `weight` is written, beside the memory of `weight` (`memory_for_logits`)."""


@dataclass(frozen=True)
class Wanted:
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool
    report: bool = False
    """Of what is pooled."""

    @classmethod
    def of(cls, gradients: Gradients) -> Wanted:
        """Those that have a buffer."""
        return cls(*(x is not None for x in (gradients.hidden, gradients.weight, gradients.bias, gradients.tail)))


class Backend(Protocol):
    """The three primitives, and `objective`, which may return None.

    `labels` is [N] int64, `lse` and `row_weight` [N] in the accumulator type; contiguous.
    """

    name: ClassVar[str]
    tail_block: ClassVar[int]
    """Words of a block B, counted from word 0; the last block may have fewer. 0: the backend pools no tail."""
    tail_exact_above: ClassVar[float]
    """Share of a block. If more of its words would be kept, all are."""

    def unsupported_reason(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None if the backend takes inputs of this device and type, else a sentence: why not, and what to do."""
        ...

    def kept_rows(self, head: Head, weight_gradient: torch.Tensor) -> int:
        """Number of rows whose logits fit in the memory of `weight_gradient` [V, H] and of `memory_for_logits`.

        0 where keeping them does not pay. Assumes that a gradient of the hidden states is wanted too. Its float32 sums
        take part of the workspace.
        """
        ...

    def memory_for_logits(self, head: Head, weight_gradient: torch.Tensor, rows: int) -> torch.Tensor | None:
        """`Gradients.logits` for the logits of `rows` rows, at most `kept_rows`; None if `weight_gradient` holds all.

        It is a part of `head.workspace_bytes`: calls that follow while it lives get the rest.
        """
        ...

    def logprob(
        self, head: Head, labels: torch.Tensor, keep: Gradients | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token log-probabilities l [N] and logsumexp [N]. One product.

        `keep`, if given, has a weight gradient to which nothing has been added, and `labels` score at most `kept_rows`
        rows. Afterwards `keep.weight` and `keep.logits` hold the logits of these rows, in a layout that the backend
        chooses.
        """
        ...

    def logprob_and_grad(
        self, head: Head, labels: torch.Tensor, row_weight: torch.Tensor, gradients: Gradients
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`logprob`, and the gradients for row weights that are known beforehand, from the same logits.

        Two products if only `gradients.hidden` is wanted. Three if `gradients.weight` is wanted and is float32. If it
        is 16-bit, a fourth may be needed to round each entry only once within the workspace.
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

        `kept` [N], if given, are the labels of the `logprob` call that kept logits in `gradients`. Rows scored there
        are scored in `labels` too, and take one product less. The call assigns `gradients.weight` then instead of
        adding to it.
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
        """Optional: the result of `infopo_kernels.objectives.evaluate` in one launch; None if it does not offer that.

        This pays on a device that takes longer to start the objective's 20 or so small operations than to run them.
        """
        ...


def with_memory_for_logits(backend: Backend, head: Head, into: Gradients, rows: int) -> tuple[Head, Gradients]:
    """The head with the rest of the workspace, and the buffers with memory for the logits of `rows` rows."""
    if not rows or into.weight is None:
        return head, into
    memory = backend.memory_for_logits(head, into.weight, rows)
    taken = 0 if memory is None else memory.nbytes
    return replace(head, workspace_bytes=head.workspace_bytes - taken), replace(into, logits=memory)


def scale_in_parts(values: torch.Tensor, factor: torch.Tensor) -> None:
    """`Backend.scale_` in plain PyTorch, a bounded part at a time (a mixed product copies its operands)."""
    if not factor.ndim:
        values.mul_(factor)
        return
    step = max(1, (1 << 18) // values.shape[1])
    for part, own in zip(torch.split(values, step), torch.split(factor, step), strict=True):
        part.mul_(own[:, None])
