"""The objectives: one file each, with its equations and its source, behind the protocol of `base`."""

from infopo_kernels.objectives.base import Evaluation, Objective, Sequences, Terms, evaluate, from_flat
from infopo_kernels.objectives.dpo import DPO
from infopo_kernels.objectives.infopo import InfoPO
from infopo_kernels.objectives.ipo import IPO
from infopo_kernels.objectives.pairwise import Pairwise
from infopo_kernels.objectives.sft import SFT
from infopo_kernels.objectives.simpo import SimPO

InfoPOOptions = InfoPO
"""The options of InfoPO are the objective itself."""

__all__ = [
    "DPO",
    "IPO",
    "SFT",
    "Evaluation",
    "InfoPO",
    "InfoPOOptions",
    "Objective",
    "Pairwise",
    "Sequences",
    "SimPO",
    "Terms",
    "evaluate",
    "from_flat",
]
