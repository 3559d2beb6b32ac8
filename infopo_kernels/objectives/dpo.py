"""DPO: the Bradley-Terry likelihood of the preference, with the log-ratio as the reward.

    f(margin) = -log sigmoid(margin)       f'(margin) = -sigmoid(-margin)       margin = beta (Delta_w - Delta_l)

log 2 - f, averaged over the pairs, is the InfoNCE bound (two samples) of the mutual information between a response and
its being preferred, in nats.

Source: Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", NeurIPS 2023,
equation (7).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from infopo_kernels.objectives.base import Sequences, Terms
from infopo_kernels.objectives.pairwise import Pairwise
from infopo_kernels.options import require_bool, require_positive


@dataclass(frozen=True)
class DPO(Pairwise):
    """DPO with its options.

    Args:
        beta: scale β of the log-ratios; positive.
        average: sequence log-probabilities are means over the scored tokens instead of sums (length-normalised DPO).

    Raises:
        ValueError, TypeError: a value is out of range or not a number; the message names it.
    """

    beta: float = 0.1
    average: bool = False

    name: ClassVar[str] = "dpo"

    def __post_init__(self) -> None:
        require_positive("beta", self.beta, "typical values lie between 0.01 and 0.5.")
        require_bool("average", self.average)

    def of_margin(self, margin: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.nn.functional.logsigmoid(margin), -torch.sigmoid(-margin)

    def terms(self, sums: Tensor, sequences: Sequences) -> Terms:
        each = super().terms(sums, sequences)
        return each._replace(bound=math.log(2) / 2 - each.loss.detach())
