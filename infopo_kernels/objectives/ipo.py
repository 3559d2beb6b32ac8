"""IPO: the margin of the log-ratios is pulled to a finite target, so that certain preferences do not drive it away.

    f(margin) = (Delta_w - Delta_l - 1 / (2 beta))^2 = (margin - 1/2)^2 / beta^2         f' = 2 (margin - 1/2) / beta^2

with margin = beta (Delta_w - Delta_l); beta is the paper's tau.

Source: Azar et al., "A General Theoretical Paradigm to Understand Learning from Human Preferences", AISTATS 2024,
equation (17). Its authors take means over the tokens in practice, which is the default here as in TRL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from infopo_kernels.objectives.pairwise import Pairwise
from infopo_kernels.options import require_bool, require_positive


@dataclass(frozen=True)
class IPO(Pairwise):
    """IPO with its options.

    Args:
        beta: the paper's τ, strength of the regularisation: the target of the margin is ``1 / (2 beta)``; positive.
        average: sequence log-probabilities are means over the scored tokens; False takes sums, as the paper writes it.

    Raises:
        ValueError, TypeError: a value is out of range or not a number; the message names it.
    """

    beta: float = 0.1
    average: bool = True

    name: ClassVar[str] = "ipo"

    def __post_init__(self) -> None:
        require_positive("beta", self.beta, "typical values lie between 0.01 and 1.")
        require_bool("average", self.average)

    def of_margin(self, margin: Tensor) -> tuple[Tensor, Tensor]:
        distance = (margin - 0.5) / self.beta
        return distance.square(), 2 * distance / self.beta
