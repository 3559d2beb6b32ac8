"""InfoPO on transformers' own `Trainer`: a collator, a `compute_loss`, and a `Trainer` that has both."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from infopo_kernels.integrations.preference_step import (
    infopo_output,
    metric_sums,
    metrics,
    reference_logps,
    split_inputs,
)
from infopo_kernels.integrations.transformers import attach_linear_logps, is_attached
from infopo_kernels.objectives import InfoPOOptions
from infopo_kernels.options import KernelOptions

try:
    from transformers import Trainer
except ImportError as error:
    raise ImportError(
        "infopo_kernels.integrations.trainer needs the packages `transformers` and `accelerate`; run: "
        "pip install 'infopo_kernels[train]'"
    ) from error

_PREFERENCE_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")


def compute_infopo_loss(
    model: Any,
    inputs: dict[str, Any],
    options: InfoPOOptions | None = None,
    *,
    ref_model: Any = None,
    skip_chosen_reference: bool = False,
) -> Any:
    """The InfoPO loss of a batch of `infopo_kernels.integrations.collators`, for the `compute_loss` of any trainer.

    Example::

        class MyTrainer(Trainer):
            loss_is_scaled_for_ga = False  # the loss is the mean over the pairs of the batch

            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                out = compute_infopo_loss(model, inputs, InfoPOOptions(beta=0.1))
                return (out.loss, out) if return_outputs else out.loss

    Args:
        model: with `attach_linear_logps`, wrapped or not.
        inputs: the batch. The reference is its `ref_logps` [2B] if it holds them; else `ref_model`'s; else, of a model
            with an adapter, the model's with the adapter switched off; else there is none (reference-free).
        options: hyper-parameters.
        ref_model: with `attach_linear_logps`.
        skip_chosen_reference: see `linear_infopo_loss`; halves the reference's work.

    Returns:
        `LinearLogpsOutput`: `loss` with its gradient, `infopo` with everything one logs.
    """
    options = options or InfoPOOptions()
    model_inputs, known = split_inputs(inputs)
    if "ref_logps" not in known:
        adapted = _unwrapped(model)
        with_adapter = hasattr(adapted, "disable_adapter") and hasattr(adapted, "peft_config")
        if ref_model is not None or with_adapter:
            known["ref_logps"] = reference_logps(
                model if ref_model is None else ref_model,
                model_inputs,
                average=options.average,
                skip_chosen=skip_chosen_reference,
                adapter=adapted.disable_adapter() if ref_model is None else None,
            )
    return infopo_output(model, model_inputs, known, options, skip_chosen_reference=skip_chosen_reference)


def _unwrapped(model: Any) -> Any:
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model, keep_torch_compile=False)


class PreferenceTrainer(Trainer):
    """transformers' `Trainer` on preference pairs with the InfoPO loss, without logits.

    Example::

        trainer = PreferenceTrainer(
            model, TrainingArguments("out", learning_rate=1e-5), train_dataset=features,
            data_collator=PreferenceCollator(max_length=1024), infopo=InfoPOOptions(beta=0.1), ref_model=reference,
        )

    Args:
        infopo: hyper-parameters of the objective.
        kernel: backend and workspace.
        ref_model: the reference; not needed with `ref_chosen_logps` and `ref_rejected_logps` in the dataset, nor with
            an adapter, which is switched off for it. With none of them the loss is reference-free.
        skip_chosen_reference: see `linear_infopo_loss`.

    Other arguments are those of `Trainer`; the dataset holds `prompt_ids`, `chosen_ids`, `rejected_ids` (see
    `preference_features`). The metrics of `preference_step.metrics` are logged.

    Raises:
        ValueError: several GPUs in one process (`nn.DataParallel`), or no collator.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        *args: Any,
        infopo: InfoPOOptions | None = None,
        kernel: KernelOptions | None = None,
        ref_model: Any = None,
        skip_chosen_reference: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                "PreferenceTrainer does not run under nn.DataParallel, which Trainer uses with several GPUs in one "
                "process; start it with torchrun or `accelerate launch`, or make one GPU visible."
            )
        self.infopo = infopo or InfoPOOptions()
        self.skip_chosen_reference = skip_chosen_reference
        for each in (self.model, ref_model):
            if each is not None and not is_attached(each):
                attach_linear_logps(each, kernel=kernel)
        self.ref_model = ref_model
        if ref_model is not None:
            self.ref_model = self.accelerator.prepare_model(ref_model.eval(), evaluation_mode=True)
        self._sums: dict[str, list[Tensor]] = defaultdict(list)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = vars(self)["_signature_columns"]
        self._signature_columns = [*columns, *(name for name in _PREFERENCE_COLUMNS if name not in columns)]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The InfoPO loss, averaged over the pairs of the batch."""
        out = compute_infopo_loss(
            model, inputs, self.infopo, ref_model=self.ref_model, skip_chosen_reference=self.skip_chosen_reference
        )
        self._sums["train" if model.training else "eval"].append(metric_sums(out.infopo, self.infopo))
        return (out.loss, out) if return_outputs else out.loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """The loss; there are no logits to return."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics gathered since the last time."""
        mode = "eval" if any(key.startswith("eval_") for key in logs) else "train"
        if self._sums[mode]:
            stacked = torch.stack(self._sums.pop(mode))
            mean = torch.cat([stacked[:, :-1].mean(0), stacked[:, -1:].amax(0)])
            gathered = self.accelerator.gather(mean[None])
            prefix = "eval_" if mode == "eval" else ""
            logs |= {prefix + name: value for name, value in metrics(gathered).items()}
        super().log(logs, start_time)
