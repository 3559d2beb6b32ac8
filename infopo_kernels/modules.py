"""The losses as modules. The constructor takes the options, the call takes the tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from infopo_kernels import checks
from infopo_kernels.functional import infopo_loss, linear_preference_loss
from infopo_kernels.objectives import InfoPO, Objective
from infopo_kernels.options import IGNORE_INDEX, KernelOptions, LogitOptions, arguments
from infopo_kernels.output import InfoPOOutput, PreferenceOutput


def _listed(*options: object) -> str:
    return ", ".join(f"{key}={value!r}" for each in options for key, value in arguments(each).items())


class InfoPOLoss(nn.Module):
    """`infopo_loss` as a module that holds its options.

    Args:
        options: hyper-parameters of the objective; the defaults of `InfoPO` if None.

    Example::

        loss_fn = InfoPOLoss(InfoPO(beta=0.1))
        loss_fn(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps).loss.backward()
    """

    def __init__(self, options: InfoPO | None = None) -> None:
        super().__init__()
        self.options = options or InfoPO()

    def forward(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        ref_chosen_logps: Tensor | None = None,
        ref_rejected_logps: Tensor | None = None,
        **kwargs: Any,
    ) -> InfoPOOutput:
        """See `infopo_loss`; `kwargs` are its lengths and `num_pairs`."""
        return infopo_loss(
            chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, **arguments(self.options), **kwargs
        )

    def extra_repr(self) -> str:
        return _listed(self.options)


class LinearPreferenceLoss(nn.Module):
    """`linear_preference_loss` as a module that holds its objective and options.

    The head's weight stays in the model and comes with each call.

    Args:
        objective: any of `infopo_kernels.objectives`.
        logit: softcap, scale and temperature of the logits; the identity if None.
        kernel: backend and workspace; "auto" if None.
        shift: score each row on the label of the next row.
        ignore_index: label of rows that are not scored.

    Example::

        loss_fn = LinearPreferenceLoss(DPO(beta=0.1), shift=True)
        hidden = model.model(input_ids).last_hidden_state                   # [2B, T, H], chosen first
        loss_fn(hidden, model.lm_head.weight, labels, ref_logps=ref_logps).loss.backward()
    """

    def __init__(
        self,
        objective: Objective,
        *,
        logit: LogitOptions | None = None,
        kernel: KernelOptions | None = None,
        shift: bool = False,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        super().__init__()
        self.objective = checks.objective(objective)
        self.logit = logit or LogitOptions()
        self.kernel = kernel or KernelOptions()
        self.shift = shift
        self.ignore_index = ignore_index

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor, **kwargs: Any) -> PreferenceOutput:
        """See `linear_preference_loss`; `kwargs` are its layout and reference arguments."""
        return linear_preference_loss(
            hidden,
            weight,
            labels,
            objective=self.objective,
            shift=self.shift,
            ignore_index=self.ignore_index,
            **arguments(self.logit),
            **arguments(self.kernel),
            **kwargs,
        )

    def extra_repr(self) -> str:
        return f"{self.objective}, {_listed(self.logit, self.kernel)}, shift={self.shift}"


class LinearInfoPOLoss(LinearPreferenceLoss):
    """`linear_infopo_loss` as a module that holds its options: `LinearPreferenceLoss` with InfoPO as the objective.

    Args:
        options: hyper-parameters of the objective; the defaults of `InfoPO` if None.
        logit, kernel, shift, ignore_index: see `LinearPreferenceLoss`.
    """

    def __init__(
        self,
        options: InfoPO | None = None,
        *,
        logit: LogitOptions | None = None,
        kernel: KernelOptions | None = None,
        shift: bool = False,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        super().__init__(options or InfoPO(), logit=logit, kernel=kernel, shift=shift, ignore_index=ignore_index)

    @property
    def options(self) -> InfoPO:
        """The objective."""
        assert isinstance(self.objective, InfoPO)
        return self.objective
