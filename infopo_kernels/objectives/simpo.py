"""SimPO: the mean token log-probability as the reward, without a reference, and a margin that has to be exceeded.

    f(margin) = -log sigmoid(margin - gamma)        f'(margin) = -sigmoid(gamma - margin)

    margin = beta (L_w - L_l), L_s = sum_t l_t / n_s

Source: Meng, Xia, Chen, "SimPO: Simple Preference Optimization with a Reference-Free Reward", NeurIPS 2024,
equation (6).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from infopo_kernels.objectives.base import References
from infopo_kernels.objectives.pairwise import Pairwise
from infopo_kernels.options import require_finite, require_positive


@dataclass(frozen=True)
class SimPO(Pairwise):
    """SimPO with its options.

    Args:
        beta: scale β of the mean log-probabilities; positive.
        gamma: target margin γ of the rewards.

    Raises:
        ValueError, TypeError: a value is out of range or not a number; the message names it.
    """

    beta: float = 2.0
    gamma: float = 1.0

    name: ClassVar[str] = "simpo"
    reference: ClassVar[References] = "none"

    def __post_init__(self) -> None:
        require_positive("beta", self.beta, "typical values lie between 2 and 10.")
        require_finite("gamma", self.gamma)

    @property
    def average(self) -> bool:
        return True

    def of_margin(self, margin: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.nn.functional.logsigmoid(margin - self.gamma), -torch.sigmoid(self.gamma - margin)
