"""What every way of sharing a head has in common: where the parts begin, and labels as a part sees them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from infopo_kernels.backends.base import Gradients, Head
from infopo_kernels.distributed import collectives
from infopo_kernels.options import ELSEWHERE, IGNORE_INDEX


@dataclass(frozen=True)
class Parts:
    """Adjoining parts of a vocabulary, one on each rank of a group."""

    group: str
    bounds: tuple[int, ...]
    """[R + 1]: the first entry of each part, then V."""

    @property
    def ranks(self) -> int:
        return len(self.bounds) - 1

    @property
    def rank(self) -> int:
        """This rank's place in the group."""
        return collectives.rank(self.group)

    def rows(self, rank: int) -> int:
        """Entries of a rank's part, without padding."""
        return self.bounds[rank + 1] - self.bounds[rank]

    def labels(self, labels: Tensor, rank: int) -> Tensor:
        """Labels as a part sees them: counted from its start, ELSEWHERE if in another part, -1 if in none."""
        start, stop = self.bounds[rank : rank + 2]
        outside = torch.where((labels >= 0) & (labels < self.bounds[-1]), ELSEWHERE, -1)
        outside = torch.where(labels == IGNORE_INDEX, IGNORE_INDEX, outside)
        return torch.where((labels >= start) & (labels < stop), labels - start, outside)

    def own(self, head: Head) -> Head:
        """The head of this rank's part, without rows of padding."""
        rows = self.rows(self.rank)
        if rows == len(head.weight):
            return head
        return replace(head, weight=head.weight[:rows], bias=None if head.bias is None else head.bias[:rows])

    def own_gradients(self, gradients: Gradients) -> Gradients:
        """Buffers of the same rows."""
        rows = self.rows(self.rank)
        weight, bias = gradients.weight, gradients.bias
        return replace(
            gradients, weight=None if weight is None else weight[:rows], bias=None if bias is None else bias[:rows]
        )


def logit_of_label(labels: Tensor, logp: Tensor, lse: Tensor) -> Tensor:
    """z_y = l + lse where the label lies in the part, NaN if it lies in none, else 0; `labels` are the part's.

    If all logits of the part are -inf, l is NaN, and z_y is -inf as they are.
    """
    z = torch.where((labels >= 0) & lse.isneginf(), lse, logp + lse)
    return torch.where(labels == ELSEWHERE, 0.0, z)


def merged(labels: Tensor, lse: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """l and lse [N] from each part's lse [R, N] and logit of the label [R, N] (0 where the label is elsewhere)."""
    scored = labels != IGNORE_INDEX
    whole = torch.where(scored, lse.double().logsumexp(0), 0.0)
    picked = torch.where(scored, target.double().sum(0), 0.0)
    return (picked - whole).to(lse.dtype), whole.to(lse.dtype)
