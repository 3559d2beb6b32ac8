"""Fused LM-head loss for preference training with InfoPO: hidden states, head and labels to loss and gradients.

Importing this package needs torch only. Mathematics: `infopo_kernels.objective`; data flow: `functional` ->
`ops` -> `schedule` -> `backends`.
"""

from infopo_kernels.libraries import require_torch

require_torch()  # before anything else imports it: the error says what to install

from infopo_kernels.dispatch import available_backends
from infopo_kernels.functional import InfoPOOutput, infopo_loss, linear_infopo_loss, linear_logps
from infopo_kernels.modules import InfoPOLoss, LinearInfoPOLoss
from infopo_kernels.options import InfoPOOptions, KernelOptions, LogitOptions

__version__ = "0.1.0"

__all__ = [
    "InfoPOLoss",
    "InfoPOOptions",
    "InfoPOOutput",
    "KernelOptions",
    "LinearInfoPOLoss",
    "LogitOptions",
    "__version__",
    "available_backends",
    "infopo_loss",
    "linear_infopo_loss",
    "linear_logps",
]
