"""SFT: the negative log-likelihood of the chosen responses. Rejected ones take no part; they are only logged.

    term_s = -L_s      slope_s = -k_s, k_s = 1 / n_s (or 1 without `average`)      chosen
           =  0                = 0                                                 rejected

Every slope is known beforehand: rejected rows cost one product, chosen rows three in one pass.

Source: maximum likelihood; the term that `sft_weight` adds to InfoPO.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from infopo_kernels.objectives.base import Known, Objective, References, Sequences, Terms, levels
from infopo_kernels.options import require_bool


@dataclass(frozen=True)
class SFT(Objective):
    """SFT with its options.

    Args:
        average: the mean over the scored tokens of each response; False takes sums.

    Raises:
        TypeError: not a boolean.
    """

    average: bool = True

    name: ClassVar[str] = "sft"
    known: ClassVar[Known] = "all"
    reference: ClassVar[References] = "none"

    def __post_init__(self) -> None:
        require_bool("average", self.average)

    def terms(self, sums: Tensor, sequences: Sequences) -> Terms:
        logps = levels(sums, sequences, self.average)
        weights = sequences.is_chosen.to(torch.float64)
        loss = torch.where(sequences.is_chosen, -logps, 0.0)
        return Terms(logps, logps.detach().clone(), loss, self.known_slopes(sequences), weights, bound=None)

    def known_slopes(self, sequences: Sequences) -> Tensor:
        return -levels(sequences.is_chosen.to(torch.float64), sequences, self.average)
