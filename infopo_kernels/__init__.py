"""Fused LM-head loss for preference training: from hidden states, head and labels to the loss and its gradients.

To import this package you need torch only. Mathematics: `infopo_kernels.objectives`. Data flow: `functional` -> `ops`
-> `schedule` -> `backends`.
"""

from infopo_kernels.libraries import require_torch, warn_untested

require_torch()  # before anything else imports it: the error says what to install
warn_untested("torch")

from infopo_kernels.backends.dispatch import available_backends
from infopo_kernels.functional import infopo_loss, linear_infopo_loss, linear_logps, linear_preference_loss
from infopo_kernels.modules import InfoPOLoss, LinearInfoPOLoss, LinearPreferenceLoss
from infopo_kernels.objectives import DPO, IPO, SFT, InfoPO, InfoPOOptions, SimPO
from infopo_kernels.options import KernelOptions, LogitOptions
from infopo_kernels.output import InfoPOOutput, PreferenceOutput

__version__ = "0.1.0"

__all__ = [
    "DPO",
    "IPO",
    "SFT",
    "InfoPO",
    "InfoPOLoss",
    "InfoPOOptions",
    "InfoPOOutput",
    "KernelOptions",
    "LinearInfoPOLoss",
    "LinearPreferenceLoss",
    "LogitOptions",
    "PreferenceOutput",
    "SimPO",
    "__version__",
    "available_backends",
    "infopo_loss",
    "linear_infopo_loss",
    "linear_logps",
    "linear_preference_loss",
]
