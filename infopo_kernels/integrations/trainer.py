"""Preference losses on transformers' own `Trainer`: a loss for any `compute_loss`, and a `Trainer` with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infopo_kernels.integrations.collators import PackedPreferenceCollator, PreferenceCollator
from infopo_kernels.integrations.step import (
    check_finite,
    number_of_chosen,
    preference_output,
    reference_logps,
    split_inputs,
)
from infopo_kernels.integrations.transformers import attach_linear_logps, is_attached
from infopo_kernels.libraries import import_failure, require_methods, warn_untested
from infopo_kernels.objectives import InfoPO, Objective
from infopo_kernels.options import KernelOptions

try:
    from accelerate.utils import extract_model_from_parallel
    from transformers import Trainer

    from infopo_kernels.integrations.preference_training import OVERRIDDEN, PreferenceTraining
except ImportError as error:
    raise import_failure(__name__, ("transformers", "accelerate"), "train", error) from error
warn_untested("transformers", "accelerate", "peft")
require_methods("transformers", Trainer, OVERRIDDEN)


def compute_infopo_loss(
    model: Any,
    inputs: dict[str, Any],
    options: Objective | None = None,
    *,
    ref_model: Any = None,
    skip_chosen_reference: bool = False,
    reference_free: bool = False,
) -> Any:
    """The preference loss of a batch of `infopo_kernels.integrations.collators`, for the `compute_loss` of any trainer.

    Example::

        class MyTrainer(Trainer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.model_accepts_loss_kwargs = False  # a mean over the batch's pairs: to be divided when accumulated

            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                out = compute_infopo_loss(model, inputs, InfoPOOptions(beta=0.1))
                return (out.loss, out) if return_outputs else out.loss

    Args:
        model: with `attach_linear_logps`, wrapped or not.
        inputs: the batch. The reference is its `ref_logps` [S] if it holds them; else `ref_model`; else the model
            with its adapter switched off, if it has one.
        options: the objective with its hyper-parameters: `InfoPO` (the default), or another of
            `infopo_kernels.objectives`.
        ref_model: with `attach_linear_logps`. Call `randomness.disable_dropout` on it and on the model first, or their
            log-ratios are noise.
        skip_chosen_reference: see `linear_infopo_loss`; halves the reference's work.
        reference_free: there is no reference, and rewards are ``beta * logps``. Every rejected weight is
            then about 0 for sums of hundreds of nats, and InfoPO is plain SFT; use ``average=True``.

    Returns:
        `LinearLogpsOutput`: `loss` with its gradient, `infopo` with everything one logs.

    Raises:
        ValueError: there is no reference, and `reference_free` was not asked for; or there is one, and it was.
        RuntimeError: the model is not attached, or not any more.
        FloatingPointError: on a CPU, the loss that would be trained on is not finite (`step.check_finite` elsewhere; it
            has to wait for the device).
    """
    objective = options or InfoPO()
    model_inputs, known = split_inputs(inputs)
    if objective.reference == "none":
        known.pop("ref_logps", None)
    elif "ref_logps" not in known:
        adapter = None if ref_model is not None or reference_free else _without_adapter(model)
        _check_reference(ref_model is not None or adapter is not None, reference_free)
        if not reference_free:
            known["ref_logps"] = reference_logps(
                model if ref_model is None else ref_model,
                model_inputs,
                average=objective.average,
                skip_chosen=skip_chosen_reference,
                num_chosen=number_of_chosen(model_inputs, known),
                adapter=adapter,
            )
    else:
        _check_reference(True, reference_free)
    out, result = preference_output(model, model_inputs, known, objective, skip_chosen_reference=skip_chosen_reference)
    if result.loss.requires_grad and result.loss.device.type == "cpu":
        check_finite(result, objective)
    return out


def _without_adapter(model: Any) -> Any:
    """A context in which a model with an adapter is its own reference; None for a model without one."""
    adapted = extract_model_from_parallel(model, keep_torch_compile=False)
    with_adapter = hasattr(adapted, "disable_adapter") and hasattr(adapted, "peft_config")
    return adapted.disable_adapter() if with_adapter else None


def _check_reference(present: bool, reference_free: bool) -> None:
    if present and reference_free:
        raise ValueError(
            "`reference_free=True` was given although there is a reference (`ref_logps` in the batch, or `ref_model`); "
            "leave one of them out."
        )
    if not present and not reference_free:
        raise ValueError(
            "There is no reference: the batch holds no `ref_logps`, there is no `ref_model`, and the model has no "
            "adapter to switch off. Pass one of them (`python -m infopo_kernels precompute-reference` writes "
            "log-probabilities ahead of time), or ask for `reference_free=True`; without a reference the weight of a "
            "rejected response of -250 nats is about e^-26, and the run is SFT."
        )


def _refuse_text(name: str, dataset: Any, collator: Any) -> None:
    """Raise if rows hold text for one of this package's collators, which take token ids.

    Without this check, Trainer removes the columns that the model does not know, and says that nothing is left.
    """
    held = isinstance(dataset, (list, tuple)) or hasattr(dataset, "with_format")
    own = isinstance(collator, PreferenceCollator | PackedPreferenceCollator)
    if not (own and held and hasattr(dataset, "__len__") and len(dataset)):
        return
    row = dataset[0]
    if isinstance(row, dict) and "chosen" in row and row.get("chosen_ids") is None:
        raise ValueError(
            f"`{name}` must hold features (`prompt_ids`, `chosen_ids`, `rejected_ids`), got rows of text "
            f"({', '.join(row)}); make features with preference_features(tokenizer, rows), or with feature_dataset for "
            f"a table."
        )


class PreferenceTrainer(PreferenceTraining, Trainer):  # type: ignore[misc]
    """transformers' `Trainer` on preference pairs with the InfoPO loss, or another objective, without logits.

    Example::

        trainer = PreferenceTrainer(
            model, TrainingArguments("out", learning_rate=1e-5), train_dataset=features,
            data_collator=PreferenceCollator(max_length=1024), infopo=InfoPOOptions(beta=0.1), ref_model=reference,
        )

    Args:
        infopo: hyper-parameters of InfoPO.
        objective: another objective of `infopo_kernels.objectives` instead.
        kernel: backend and workspace.
        ref_model: the reference; not needed with `ref_chosen_logps` and `ref_rejected_logps` in the dataset, nor with
            an adapter, which is switched off for it.
        skip_chosen_reference: see `linear_infopo_loss`.
        reference_free: train without a reference; see `compute_infopo_loss`.
        disable_dropout: switch off dropout, layer dropout and router jitter in policy and reference, and log what was
            changed. TRL's `DPOConfig` has the same option.
        strict_checks: errors instead of warnings from the checks of the first step (docs/checks.md).

    Other arguments are those of `Trainer`; `data_collator` is a `PreferenceCollator` if none is given. Datasets hold
    `prompt_ids`, `chosen_ids`, `rejected_ids` (see `preference_features`). The metrics of `step.metrics` are logged, of
    an evaluation under its own prefix.

    Raises:
        ValueError: several GPUs in one process (`nn.DataParallel`), split sequences that cannot be served (see
            `SplitSequences.check`), NEFTune together with `disable_dropout`, no reference and no `reference_free`, or
            (with a collator of this package) rows of text instead of features, token ids or lengths that the model
            cannot take.
        FloatingPointError: while training, a loss or a gradient that is not finite; no weight is changed by that step.
        RuntimeError: the model's attached forward was lost; with `strict_checks`, a first step that is not the
            reference's.
    """

    def __init__(
        self,
        *args: Any,
        infopo: InfoPO | None = None,
        objective: Objective | None = None,
        kernel: KernelOptions | None = None,
        ref_model: Any = None,
        skip_chosen_reference: bool = False,
        reference_free: bool = False,
        disable_dropout: bool = True,
        strict_checks: bool = False,
        **kwargs: Any,
    ) -> None:
        if infopo is not None and objective is not None:
            raise ValueError("`infopo` and `objective` were both given; pass one of them.")
        if reference_free and ref_model is not None:
            _check_reference(True, reference_free)
        if len(args) < 3 and kwargs.get("data_collator") is None:
            kwargs["data_collator"] = PreferenceCollator()
        super().__init__(*args, **kwargs)
        self.objective = objective or infopo or InfoPO()
        self.skip_chosen_reference = skip_chosen_reference
        self.reference_free = reference_free
        self.strict_checks = strict_checks
        for each in (self.model, ref_model):
            if each is not None and not is_attached(each):
                attach_linear_logps(each, kernel=kernel)
        if isinstance(self.data_collator, PreferenceCollator | PackedPreferenceCollator):  # others may cut otherwise
            self._check_data(self.data_collator.max_length)
        self._prepare_preferences(ref_model, ref_model, dropout=not disable_dropout)
        self.ref_model = ref_model
        if ref_model is not None:
            self.ref_model = self._wrapped_reference(ref_model.eval())

    def _wrapped_reference(self, reference: Any) -> Any:
        if self.is_deepspeed_enabled:  # an engine of its own, without an optimiser
            from trl.models.utils import prepare_deepspeed  # needs trl, which no other path through here does

            return prepare_deepspeed(reference, self.accelerator)
        return self.accelerator.prepare_model(reference, evaluation_mode=True)

    def reference_for(self, model: Any) -> tuple[Any, Any] | None:
        """`ref_model`, or the model with its adapter switched off."""
        if self.reference_free:
            return None
        if self.ref_model is not None:
            return self.ref_model, None
        adapter = _without_adapter(model)
        return None if adapter is None else (model, adapter)

    def get_train_dataloader(self) -> Any:
        """Trainer's, of features."""
        _refuse_text("train_dataset", self.train_dataset, self.data_collator)
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Trainer's, of features."""
        asked = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, str):
            asked = self.eval_dataset[eval_dataset]
        _refuse_text("eval_dataset", asked, self.data_collator)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Trainer's, of features."""
        _refuse_text("test_dataset", test_dataset, self.data_collator)
        return super().get_test_dataloader(test_dataset)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss, averaged over the pairs of the batch."""
        if self.objective.reference != "none" and self.reference_for(model) is None:
            known = split_inputs(inputs)[1]
            _check_reference("ref_logps" in known, self.reference_free)
        out, _ = self.preference_loss(model, inputs)
        return (out.loss, out) if return_outputs else out.loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """The loss; there are no logits to return."""
        context, inputs = self._in_parts(model, inputs)
        with torch.no_grad(), self.compute_loss_context_manager(), context:
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None
