"""Objectives of the margin between the two rewards of a pair; what they share.

With equations (1) to (4) of `infopo_kernels.objectives.base`, for sequence s and its partner r:

    reward_s = beta * Delta_s
    margin   = reward_chosen - reward_rejected, the same for both
    term_s   = f(margin) / 2
    slope_s  = +-beta * f'(margin) * k_s      + for chosen, - for rejected; k_s = 1 (or 1 / n_s with `average`)
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from infopo_kernels.objectives.base import Objective, Sequences, Terms, levels


class Pairwise(Objective):
    """A subclass states f and f'."""

    pairwise: ClassVar[bool] = True
    beta: float

    @abstractmethod
    def of_margin(self, margin: Tensor) -> tuple[Tensor, Tensor]:
        """f (differentiable) and f' of margins of any shape, float64."""

    def terms(self, sums: Tensor, sequences: Sequences) -> Terms:
        logps = levels(sums, sequences, self.average)
        rewards = self.beta * (logps - sequences.ref_logps)
        sign = torch.where(sequences.is_chosen, 1.0, -1.0).to(torch.float64)
        loss, slope = self.of_margin(sign * (rewards - partners(rewards, sequences)))
        by_level = self.beta * slope.detach()
        slopes = levels(sign * by_level, sequences, self.average)
        return Terms(logps, rewards, loss / 2, slopes, by_level.abs(), bound=None)


def partners(values: Tensor, sequences: Sequences) -> Tensor:
    """values [S] of each sequence's partner; NaN for one that has no partner of the other kind."""
    partner = sequences.partner
    assert partner is not None, "Sequences.paired comes first"
    return torch.where(sequences.is_chosen == sequences.is_chosen[partner], torch.nan, values[partner])
