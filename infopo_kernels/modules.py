"""The losses as modules: options at construction, tensors at the call."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from infopo_kernels.functional import InfoPOOutput, infopo_loss, linear_infopo_loss
from infopo_kernels.options import InfoPOOptions, KernelOptions, LogitOptions


def _listed(*options: object) -> str:
    return ", ".join(f"{key}={value!r}" for each in options for key, value in asdict(each).items())  # type: ignore[call-overload]


class InfoPOLoss(nn.Module):
    """`infopo_loss` with its options held.

    Args:
        options: hyper-parameters of the objective; the defaults of `InfoPOOptions` if None.

    Example::

        loss_fn = InfoPOLoss(InfoPOOptions(beta=0.1))
        loss_fn(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps).loss.backward()
    """

    def __init__(self, options: InfoPOOptions | None = None) -> None:
        super().__init__()
        self.options = options or InfoPOOptions()

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
            chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, **asdict(self.options), **kwargs
        )

    def extra_repr(self) -> str:
        return _listed(self.options)


class LinearInfoPOLoss(nn.Module):
    """`linear_infopo_loss` with its options held.

    The head's weight stays the model's own and comes with each call.

    Args:
        options: hyper-parameters of the objective; the defaults of `InfoPOOptions` if None.
        logit: softcap, scale and temperature of the logits; the identity if None.
        kernel: backend and workspace; "auto" if None.
        shift: score each row on the label of the next one.
        ignore_index: label of rows that are not scored.

    Example::

        loss_fn = LinearInfoPOLoss(InfoPOOptions(beta=0.1), shift=True)
        hidden = model.model(input_ids).last_hidden_state                   # [2B, T, H], chosen first
        loss_fn(hidden, model.lm_head.weight, labels, ref_logps=ref_logps).loss.backward()
    """

    def __init__(
        self,
        options: InfoPOOptions | None = None,
        *,
        logit: LogitOptions | None = None,
        kernel: KernelOptions | None = None,
        shift: bool = False,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        self.options = options or InfoPOOptions()
        self.logit = logit or LogitOptions()
        self.kernel = kernel or KernelOptions()
        self.shift = shift
        self.ignore_index = ignore_index

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor, **kwargs: Any) -> InfoPOOutput:
        """See `linear_infopo_loss`; `kwargs` are its layout and reference arguments."""
        return linear_infopo_loss(
            hidden,
            weight,
            labels,
            shift=self.shift,
            ignore_index=self.ignore_index,
            **asdict(self.options),
            **asdict(self.logit),
            **asdict(self.kernel),
            **kwargs,
        )

    def extra_repr(self) -> str:
        return f"{_listed(self.options, self.logit, self.kernel)}, shift={self.shift}"
