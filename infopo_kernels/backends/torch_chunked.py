"""The three primitives in plain PyTorch: any device, any floating type, bounded workspace.

`infopo_kernels.backends.base` has the equations, shapes and contract. The backend first selects the scored rows; on a
GPU the host waits for this. Logits exist as one tile of C rows by T vocabulary entries, in float32 (float64 for float64
inputs).

The tiles stay within the workspace. On a CPU, PyTorch's own products pack more memory on top of it, and the C allocator
keeps freed memory. Measured for a workspace of 32 MiB, at any number of tokens: up to 39 MiB resident, and up to 70 MiB
where glibc keeps freed memory, which is its default.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from infopo_kernels.backends.base import Gradients, Head, TailReport, scale_in_parts
from infopo_kernels.objectives import Evaluation, Objective, Sequences
from infopo_kernels.options import ELSEWHERE, IGNORE_INDEX
from infopo_kernels.packing import Rows

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MIN_STORED_ROWS = 64
"""If the workspace holds fewer rows of whole logits than this, recomputing a wide tile is faster than storing a narrow
one (2 cores with AVX-512: a product with 32 rows runs at less than half the rate of a product with 256)."""

TAIL_BLOCK = 512
"""Words of a block that pools its tail. One pool for the whole vocabulary gives the same error, to two digits, as one
for each 512 words; a pool is one column more."""


@dataclass(frozen=True)
class _Tiles:
    """Sizes of a tile: C rows of hidden states, T rows of the weight."""

    rows: int
    vocab: int

    @classmethod
    def within(cls, workspace_bytes: int, head: Head) -> _Tiles:
        """Splits the workspace: a quarter for widened hidden states, a quarter for widened weights, half for logits."""
        H = head.hidden.shape[1]
        element = head.accumulator_dtype.itemsize
        vocab = max(1, min(4096, workspace_bytes // 4 // (2 * H * element)))  # the weight's tile and its gradient's
        rows = max(1, min(1024, workspace_bytes // 4 // (2 * H * element)))
        if head.tail_threshold > 0:  # whole blocks, and the gathered weights and gradients of kept words beside them
            vocab = max(1, vocab // 2)
            vocab -= vocab % TAIL_BLOCK if vocab >= TAIL_BLOCK else 0
        rows = max(1, min(rows, workspace_bytes // 2 // (4 * vocab * element)))  # logits and three temporaries
        return cls(rows, vocab)


def _chunks(rows: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    """Parts of `size` rows; none of no rows, where torch.split gives an empty one."""
    return torch.split(rows, size) if len(rows) else ()


def _vocab_tiles(head: Head, size: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
    """First vocabulary entry, weight [T, H] and bias [T] of each tile, in the accumulator type."""
    for start in range(0, head.weight.shape[0], size):
        weight = head.weight[start : start + size].to(head.accumulator_dtype)
        bias = None if head.bias is None else head.bias[start : start + size].to(head.accumulator_dtype)
        yield start, weight, bias


def _logits(head: Head, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """z [C, T] of one tile."""
    a = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
    if head.softcap is not None:
        infinite = a.isinf()  # becomes NaN: tanh would turn it into a plausible number
        a = a.div_(head.softcap).tanh_().mul_(head.softcap).masked_fill_(infinite, torch.nan)
    return a.mul_(head.scale) if head.scale != 1 else a


def _logit_gradient_(
    head: Head, z: torch.Tensor, start: int, y: torch.Tensor, lse: torch.Tensor, c: torch.Tensor
) -> torch.Tensor:
    """G [C, T] from z [C, T], which it overwrites; labels y, logsumexp and row weights c are [C], of the same rows."""
    local = y - start
    inside = (local >= 0) & (local < z.shape[1])
    chain = (z / (head.softcap * head.scale)).square_().neg_().add_(1) if head.softcap is not None else None
    # lse is rounded, and these logits may differ in rounding from those that gave lse. The clamp keeps p at most 1.
    g = z.sub_(lse[:, None]).clamp_(max=0).exp_().mul_(-c[:, None])
    g.scatter_add_(1, local.clamp(0, z.shape[1] - 1)[:, None], torch.where(inside, c, 0.0)[:, None])
    if chain is not None:
        g.mul_(chain)
    return g.mul_(head.scale) if head.scale != 1 else g


@dataclass(frozen=True)
class _Columns:
    """Columns of G of one tile, [C, K], and the rows of W that belong to them, [K, H].

    Without a threshold these are all words of the tile. With one they are the kept words and then one column for each
    block, the pools.
    """

    g: torch.Tensor
    weight: torch.Tensor
    kept: torch.Tensor | None = None
    """Kept words of the tile; None: all."""
    share: torch.Tensor | None = None
    """[T]: pi_v, 0 for kept words."""

    def add_weight_gradient(self, to: torch.Tensor, x: torch.Tensor) -> None:
        """to [T, H] += G^T X."""
        if self.kept is None or self.share is None:
            to.addmm_(self.g.T, x)
            return
        d = self.g.T @ x
        to.index_add_(0, self.kept, d[: len(self.kept)])
        for b, pool in enumerate(d[len(self.kept) :]):
            block = slice(b * TAIL_BLOCK, (b + 1) * TAIL_BLOCK)
            to[block].addr_(self.share[block], pool)

    def add_bias_gradient(self, to: torch.Tensor) -> None:
        """to [T] += G^T 1."""
        d = self.g.sum(0)
        if self.kept is None or self.share is None:
            to.add_(d)
            return
        to.index_add_(0, self.kept, d[: len(self.kept)])
        to.add_(self.share * d[len(self.kept) :].repeat_interleave(TAIL_BLOCK)[: len(to)])


def _columns(
    head: Head,
    z: torch.Tensor,  # [C, T]; is overwritten
    start: int,
    weight: torch.Tensor,  # [T, H]
    chunk: torch.Tensor,
    y: torch.Tensor,
    lse: torch.Tensor,
    c: torch.Tensor,
    report: TailReport | None,
) -> _Columns:
    """The columns of a chunk and a tile. `chunk` [C]: its rows among all; y, lse and c are theirs."""
    if head.tail_threshold == 0:
        return _Columns(_logit_gradient_(head, z, start, y, lse, c), weight)
    live, T = c != 0, z.shape[1]
    p = torch.where(live[:, None], (z - lse[:, None]).clamp_(max=0).exp_(), 0.0)
    keep = ((p >= head.tail_threshold) | p.isnan()).any(0)
    local = (y - start)[live & (y >= start) & (y < start + T)]
    keep[local] = True
    blocks = [slice(b, min(b + TAIL_BLOCK, T)) for b in range(0, T, TAIL_BLOCK)]
    for block in blocks:
        keep[block] |= p[:, block].isnan().any()
    kept = keep.nonzero().squeeze(1)
    if report is not None:
        report.columns.add_(torch.tensor([len(kept), T], dtype=torch.float64, device=z.device))
        if start == 0:
            report.mass[chunk[live]] = 0
    if len(kept) == T:
        return _Columns(_logit_gradient_(head, z, start, y, lse, c), weight)
    p[:, kept] = 0
    if report is not None:
        report.mass.index_add_(0, chunk[live], p[live].sum(1))
    mass = p.sum(0)
    g = _logit_gradient_(head, z, start, y, lse, c)
    share = torch.cat([mass[b] / mass[b].sum().clamp(min=torch.finfo(mass.dtype).tiny) for b in blocks])
    tail_weight = torch.stack([share[b] @ weight[b] for b in blocks])
    kept_g = g[:, kept]
    g[:, kept] = 0
    pools = torch.stack([g[:, b].sum(1) for b in blocks], 1)
    return _Columns(torch.cat([kept_g, pools], 1), torch.cat([weight[kept], tail_weight]), kept, share)


class TorchBackend:
    """Plain PyTorch."""

    name: ClassVar[str] = "torch"
    tail_block: ClassVar[int] = TAIL_BLOCK
    tail_exact_above: ClassVar[float] = 1.0

    def unsupported_reason(self, device: torch.device, dtype: torch.dtype) -> str | None:
        del device
        if dtype in _FLOATING:
            return None
        return f"plain PyTorch serves {', '.join(map(str, _FLOATING))}, not {dtype}; cast `hidden` and `weight`."

    def kept_rows(self, head: Head, weight_gradient: torch.Tensor) -> int:
        del head, weight_gradient
        return 0

    def memory_for_logits(self, head: Head, weight_gradient: torch.Tensor, rows: int) -> None:
        del head, weight_gradient, rows

    def scale_(self, values: torch.Tensor, factor: torch.Tensor) -> None:
        """values *= factor, in plain PyTorch."""
        scale_in_parts(values, factor)

    def objective(
        self, objective: Objective, logp: torch.Tensor, rows: Rows, sequences: Sequences
    ) -> Evaluation | None:
        del objective, logp, rows, sequences
        return None

    def logprob(
        self, head: Head, labels: torch.Tensor, keep: Gradients | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert keep is None, "kept_rows is 0"
        rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        out_logp = torch.zeros(labels.shape, dtype=head.accumulator_dtype, device=labels.device)
        out_lse = torch.zeros_like(out_logp)
        tiles = _Tiles.within(head.workspace_bytes, head)
        for chunk in _chunks(rows, tiles.rows):
            x, y = head.hidden[chunk].to(head.accumulator_dtype), labels[chunk]
            lse = torch.full(chunk.shape, -torch.inf, dtype=x.dtype, device=x.device)
            target = torch.where(y == ELSEWHERE, 0.0, torch.full_like(lse, torch.nan))  # NaN: outside the vocabulary
            for start, weight, bias in _vocab_tiles(head, tiles.vocab):
                z = _logits(head, x, weight, bias)
                local = y - start
                inside = (local >= 0) & (local < z.shape[1])
                picked = z.gather(1, local.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1)
                target = torch.where(inside, picked, target)
                lse = torch.logaddexp(lse, z.logsumexp(1))
            lse = torch.where(lse.isposinf(), torch.nan, lse)  # a logit of +inf: then no probability is defined
            out_logp[chunk], out_lse[chunk] = target - lse, lse
        return out_logp, out_lse

    def logprob_and_grad(
        self, head: Head, labels: torch.Tensor, row_weight: torch.Tensor, gradients: Gradients
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stored = head.workspace_bytes // 2 // (head.weight.shape[0] * head.accumulator_dtype.itemsize)
        accumulates = gradients.weight is None or gradients.weight.dtype == head.accumulator_dtype
        if stored < _MIN_STORED_ROWS or not accumulates:
            logp, lse = self.logprob(head, labels)
            if gradients.hidden is not None:  # `backward` does not write rows of weight 0
                gradients.hidden.index_fill_(0, (labels != IGNORE_INDEX).nonzero().squeeze(1), 0)
            self.backward(head, labels, lse, row_weight, gradients)
            return logp, lse
        return self._from_stored_logits(head, labels, row_weight, gradients, stored)

    def _from_stored_logits(
        self, head: Head, labels: torch.Tensor, row_weight: torch.Tensor, gradients: Gradients, stored: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Forms the logits z [C, V] of each chunk once, reduces them, and turns them into G tile by tile."""
        out_logp = torch.zeros(labels.shape, dtype=head.accumulator_dtype, device=labels.device)
        out_lse = torch.zeros_like(out_logp)
        rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        tiles = _Tiles.within(head.workspace_bytes // 2, head)
        for chunk in _chunks(rows, min(stored, tiles.rows)):
            x, y, c = head.hidden[chunk].to(head.accumulator_dtype), labels[chunk], row_weight[chunk]
            z = x.new_empty(len(chunk), head.weight.shape[0])
            lse = torch.full(chunk.shape, -torch.inf, dtype=x.dtype, device=x.device)
            for start, weight, bias in _vocab_tiles(head, tiles.vocab):
                tile = _logits(head, x, weight, bias)
                z[:, start : start + tiles.vocab] = tile
                lse = torch.logaddexp(lse, tile.logsumexp(1))
            lse = torch.where(lse.isposinf(), torch.nan, lse)
            inside = (y >= 0) & (y < z.shape[1])
            target = z.gather(1, y.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1)
            target = torch.where(inside, target, torch.where(y == ELSEWHERE, 0.0, torch.nan))
            out_logp[chunk], out_lse[chunk] = target - lse, lse
            dx = torch.zeros_like(x)
            for start, weight, _ in _vocab_tiles(head, tiles.vocab):
                tile = z[:, start : start + tiles.vocab]
                columns = _columns(head, tile, start, weight, chunk, y, lse, c, gradients.tail)
                dx.addmm_(columns.g, columns.weight)
                if gradients.weight is not None:
                    columns.add_weight_gradient(gradients.weight[start : start + tiles.vocab], x)
                if gradients.bias is not None:
                    columns.add_bias_gradient(gradients.bias[start : start + tiles.vocab])
            if gradients.hidden is not None:
                gradients.hidden[chunk] = dx.to(gradients.hidden.dtype)
        return out_logp, out_lse

    def backward(
        self,
        head: Head,
        labels: torch.Tensor,
        lse: torch.Tensor,
        row_weight: torch.Tensor,
        gradients: Gradients,
        kept: torch.Tensor | None = None,
    ) -> None:
        assert kept is None, "kept_rows is 0"
        rows = ((labels != IGNORE_INDEX) & (row_weight != 0)).nonzero().squeeze(1)
        if not len(rows):
            return
        accumulator = head.accumulator_dtype
        dx_bytes = len(rows) * head.hidden.shape[1] * accumulator.itemsize
        if gradients.hidden is None or gradients.hidden.dtype == accumulator or dx_bytes <= head.workspace_bytes // 4:
            self._backward_rows(head, labels, lse, row_weight, gradients, rows)
            return
        # A 16-bit dX needs an accumulator, and the workspace does not hold it for all rows. So take a part of the rows
        # at a time for dX, then all rows for dW and db. Each is still rounded only once.
        part = max(1, head.workspace_bytes // 4 // (head.hidden.shape[1] * accumulator.itemsize))
        for some in _chunks(rows, part):
            self._backward_rows(head, labels, lse, row_weight, replace(gradients, weight=None, bias=None), some)
        if gradients.weight is not None or gradients.bias is not None:
            self._backward_rows(head, labels, lse, row_weight, replace(gradients, hidden=None), rows)

    def _backward_rows(
        self,
        head: Head,
        labels: torch.Tensor,
        lse: torch.Tensor,
        row_weight: torch.Tensor,
        gradients: Gradients,
        rows: torch.Tensor,
    ) -> None:
        """Loops over the vocabulary outside, over rows inside: each tile of dW is finished before the next begins."""
        accumulator, H = head.accumulator_dtype, head.hidden.shape[1]
        tiles = _Tiles.within(head.workspace_bytes // 4 * 3, head)
        in_place = gradients.hidden is not None and gradients.hidden.dtype == accumulator
        dx = None
        if gradients.hidden is not None:
            gradients.hidden.index_fill_(0, rows, 0)
            dx = None if in_place else torch.zeros(len(rows), H, dtype=accumulator, device=rows.device)
        for start, weight, bias in _vocab_tiles(head, tiles.vocab):
            dw = torch.zeros_like(weight) if gradients.weight is not None else None
            for first in range(0, len(rows), tiles.rows):
                chunk = rows[first : first + tiles.rows]
                x = head.hidden[chunk].to(accumulator)
                z = _logits(head, x, weight, bias)
                y, c = labels[chunk], row_weight[chunk]
                columns = _columns(head, z, start, weight, chunk, y, lse[chunk], c, gradients.tail)
                if dx is not None:
                    dx[first : first + tiles.rows].addmm_(columns.g, columns.weight)
                elif gradients.hidden is not None:
                    gradients.hidden.index_add_(0, chunk, columns.g @ columns.weight)
                if dw is not None:
                    columns.add_weight_gradient(dw, x)
                if gradients.bias is not None:
                    columns.add_bias_gradient(gradients.bias[start : start + tiles.vocab])
            if dw is not None and gradients.weight is not None:
                gradients.weight[start : start + tiles.vocab].add_(dw)  # added in float32, rounded once
        if dx is not None and gradients.hidden is not None:
            gradients.hidden[rows] = dx.to(gradients.hidden.dtype)
