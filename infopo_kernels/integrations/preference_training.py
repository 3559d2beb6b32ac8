"""What `PreferenceTrainer` and `InfoPOTrainer` share: the step and everything that is checked around it.

A mixin in front of transformers' `Trainer`. It gives the loss of a batch (`preference_loss`), metrics under the prefix
of the evaluation that they belong to, and refuses steps that are not finite before a weight is changed.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any, Final

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from infopo_kernels.integrations import first_step
from infopo_kernels.integrations.adapters import check_start, has_virtual_tokens
from infopo_kernels.integrations.model_limits import check_features
from infopo_kernels.integrations.randomness import check_no_neftune, disable_dropout
from infopo_kernels.integrations.references import same_start
from infopo_kernels.integrations.split_sequences import SplitSequences, UlyssesCollator, opened
from infopo_kernels.integrations.step import (
    EXACT_KEYS,
    SCORED_TOKENS,
    Inputs,
    check_finite,
    counted_once,
    mean_loss,
    merged,
    metric_sums,
    metrics,
    number_of_chosen,
    preference_output,
    reference_logps,
    split_inputs,
)
from infopo_kernels.integrations.transformers import LinearLogpsOutput, causal_model
from infopo_kernels.objectives import Objective
from infopo_kernels.output import PreferenceOutput

logger = logging.getLogger(__name__)

OVERRIDDEN: Final = ("_set_signature_columns_if_needed", "_prepare_inputs", "_get_grad_norm")
"""Private methods of Trainer that `PreferenceTraining` overrides."""

_FEATURE_COLUMNS: Final = (
    "prompt_ids", "chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask", "weight", "ref_chosen_logps",
    "ref_rejected_logps",
)  # fmt: skip


class ReferenceMemory(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Keeps the reference's log-probabilities of a few fixed tokens in the checkpoint's `trainer_state.json`.

    A resumed policy is not the reference any more, so its first step proves nothing. But the reference must give the
    same values after a resume as before.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.logps: list[float] | None = None

    def state(self) -> dict[str, Any]:
        """What the checkpoint keeps."""
        return {"args": {}, "attributes": {"logps": self.logps}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the reference, and compare with the checkpoint's answer."""
        kept = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}).get("logps")
        self.logps = self._trainer.reference_of_fixed_tokens()
        if state.global_step > 0 and kept and self.logps:
            self._trainer.compare_references(kept, self.logps)


class PreferenceTraining:
    """In front of `Trainer`; `_prepare_preferences` is called at the end of `__init__`."""

    accelerator: Any
    args: Any
    state: Any
    model: Any
    model_wrapped: Any
    train_dataset: Any
    eval_dataset: Any
    data_collator: Any

    objective: Objective
    strict_checks: bool = False
    skip_chosen_reference: bool = False
    _train_sums: list[Tensor]
    _eval_sums: list[Tensor] | None = None
    _latest: PreferenceOutput | None = None
    _first_step_proven: bool = False
    _is_start: bool = True
    _split: SplitSequences | None = None
    _signature_columns: list[str] | None

    # --- the trainer's reference ---------------------------------------------------------------------

    def reference_for(self, model: Any) -> tuple[Any, Any] | None:
        """The model to ask for reference log-probabilities and the context in which it is the reference; None: none."""
        raise NotImplementedError

    def reference_is_the_start(self) -> bool:
        """Whether policy and reference must agree at the first step.

        They need not if another model was given as the reference, nor with virtual tokens, which always have an effect.
        """
        return self._is_start and not has_virtual_tokens(self.model)

    # --- construction ---------------------------------------------------------------------------------------------

    def _prepare_preferences(self, reference: Any, given: Any, *, dropout: bool) -> None:
        """`given`: the reference that the user passed, None for the model that training starts from."""
        self._train_sums = []
        # The loss is a mean over the pairs of a batch, so Trainer divides it by the accumulation steps. Its class
        # attribute `loss_is_scaled_for_ga` says the same, but transformers before 5.19 does not know it.
        self.model_accepts_loss_kwargs = False
        divided = self.accelerator.gradient_accumulation_steps
        if divided > 1 and self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            # Trainer of transformers 5.2 to 5.5 tells Accelerate its number of steps.
            raise ValueError(
                f"Accelerate would divide the loss once more than Trainer, by its `gradient_accumulation_steps` "
                f"({divided}): gradients would be {divided} times too small. Leave accumulation to Trainer "
                f"(`gradient_accumulation_steps` of the training arguments), with transformers 5.6 or later."
            )
        self._is_start = given is None or same_start(self.model, given)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{type(self).__name__} does not run under nn.DataParallel, which Trainer uses with several GPUs in "
                f"one process; start it with torchrun or `accelerate launch`, or make one GPU visible."
            )
        check_start(self.model)
        self._split = SplitSequences.of(self.accelerator)
        if self._split is not None:
            self._split.check(type(self).__name__, self.data_collator, self.args, dropout=dropout)
            if self._split.way == "sp":
                self.data_collator = UlyssesCollator(self.data_collator)
            elif reference is not None:
                self.accelerator._prepare_cp(reference)  # what `accelerator.prepare` does for the policy
        if not dropout:
            check_no_neftune(self.model, getattr(self.args, "neftune_noise_alpha", None))
            for name, each in (("policy", self.model), ("reference", reference)):
                if each is not None and (changed := disable_dropout(each)):
                    logger.warning(
                        "What is random in the %s was switched off, so that it is compared in one mode: %s "
                        "(disable_dropout=False keeps it on).", name, ", ".join(changed),
                    )  # fmt: skip
        if reference is not None:
            _refuse_shared_weights(self.model, reference)
            first_step.report(first_step.other_type(self.model, reference), self.strict_checks)
        self.add_callback(ReferenceMemory(self))  # type: ignore[attr-defined]

    def _check_data(self, max_length: int | None) -> None:
        """Refuse features that the model cannot take (see `check_features`).

        Only tables and lists are looked at: any other object may be a stream, or make its rows when it is asked.
        """
        evaluations = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        for dataset in (self.train_dataset, *evaluations.values()):
            held = isinstance(dataset, (list, tuple)) or hasattr(dataset, "with_format")
            if held and hasattr(dataset, "__len__") and len(dataset) and "chosen_ids" in dataset[0]:
                check_features(dataset, self.model, max_length=max_length)

    # --- the step -------------------------------------------------------------------------------------------------

    def preference_loss(self, model: Any, inputs: Inputs, **extra: Any) -> tuple[LinearLogpsOutput, PreferenceOutput]:
        """The attached model's output with the loss of a batch; metrics and checks are done."""
        evaluating = self._eval_sums is not None
        if evaluating:
            inputs = self._counted_once(inputs, training=False)
        in_parts = self._split is not None and "shift_labels" in inputs
        if self._split is not None and in_parts:
            inputs = {**inputs, **self._split.groups(self.accelerator, model)}
            if evaluating:  # nothing is averaged, and the sums of an evaluation need each rank's own number of pairs
                inputs.pop("data_group", None)
        model_inputs, known = split_inputs(inputs)
        if not self._has_reference(known):
            known.pop("ref_logps", None)
        elif "ref_logps" not in known:
            known["ref_logps"] = self._reference_logps(model, model_inputs, known)
        out, result = preference_output(
            model, {**model_inputs, **extra}, known, self.objective, skip_chosen_reference=self.skip_chosen_reference
        )
        sums = metric_sums(result, self.objective, model_inputs, known)
        sums[SCORED_TOKENS] /= self._ranks_with_these_pairs(in_parts)
        (self._train_sums if self._eval_sums is None else self._eval_sums).append(sums)
        if not evaluating:
            self._latest = result._replace(loss=result.loss.detach())
            self._prove_first_step(result, "ref_logps" in known)
        return out, result

    def _has_reference(self, known: Inputs) -> bool:
        return self.objective.reference != "none" and (
            "ref_logps" in known or self.reference_for(self.model) is not None
        )

    def _reference_logps(self, model: Any, model_inputs: Inputs, known: Inputs) -> Tensor:
        asked = self.reference_for(model)
        assert asked is not None
        return reference_logps(
            asked[0],
            {key: value for key, value in model_inputs.items() if key != "data_group"} | {"use_cache": False},
            average=self.objective.average,
            skip_chosen=self.skip_chosen_reference,
            num_chosen=number_of_chosen(model_inputs, known),
            adapter=asked[1],
            # Ulysses joins parts in training mode only; all that is random was switched off.
            mode="training" if "sequence_group" in model_inputs and self._joins_in_training() else "evaluation",
        )

    # --- sequences that lie on several ranks ----------------------------------------------------------------------

    def _ranks_with_these_pairs(self, in_parts: bool) -> int:
        """How many ranks work on this rank's pairs: tensor and context parallelism, Ulysses while it trains."""
        config = getattr(self.accelerator, "parallelism_config", None)
        if config is None:
            return 1
        whole: int = config.tp_size * config.cp_size
        return whole * (config.sp_size if in_parts else 1)

    def _joins_in_training(self) -> bool:
        return self._split is not None and self._split.way == "sp"

    def _in_parts(self, model: Any, inputs: Any) -> tuple[Any, Any]:
        """Of an evaluation: the context in which context parallelism cuts a batch, and the batch."""
        if self._split is None or self._split.way != "cp":
            return contextlib.nullcontext(), inputs
        context, inputs = self._prepare_context_parallel_inputs(model, inputs)  # type: ignore[attr-defined]
        return context(), inputs

    def _set_signature_columns_if_needed(self) -> None:
        """Trainer's, so that it leaves the columns of a feature in the batch."""
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        columns = self._signature_columns or []
        self._signature_columns = [*columns, *(name for name in _FEATURE_COLUMNS if name not in columns)]

    def _prepare_inputs(self, inputs: Any) -> Any:
        """float64 stays: under DeepSpeed, Trainer casts every floating tensor of a batch to the model's type."""
        inputs = opened(inputs)
        exact = {key: inputs[key] for key in EXACT_KEYS if key in inputs}
        rest = {key: value for key, value in inputs.items() if key not in exact}
        prepared: dict[str, Any] = super()._prepare_inputs(rest)  # type: ignore[misc]
        return {**prepared, **{key: value.to(self.args.device) for key, value in exact.items()}}

    # --- duplicates of an incomplete last batch -------------------------------------------------------------------

    def _counted_once(self, inputs: Inputs, *, training: bool) -> Inputs:
        gradient_state, same = self.accelerator.gradient_state, self._ranks_with_these_pairs(in_parts=False)
        R, remainder = self.accelerator.num_processes // same, gradient_state.remainder
        if R == 1 or not gradient_state.end_of_dataloader or remainder <= 0:
            return inputs
        prompts = number_of_chosen(*split_inputs(inputs))
        unique = min(max(remainder - self.accelerator.process_index // same * prompts, 0), prompts)
        # The wrapper averages gradients over ranks; an evaluation adds the ranks' sums.
        return counted_once(inputs, unique, remainder / R if training else max(unique, 1e-9))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with pairs counted once that Accelerate repeats to fill an incomplete last batch."""
        batches, items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        if batches:
            batches[-1] = self._counted_once(batches[-1], training=True)
        return batches, items

    # --- steps that are not finite --------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's; raises FloatingPointError, before a weight is changed, if the loss is not finite."""
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self._latest is not None:
            # After the backward pass: Trainer waits for the device here anyway, to look at the same number.
            check_finite(self._latest, self.objective, f"Step {self.state.global_step + 1}")
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        scaled = getattr(self.accelerator, "scaler", None) is not None or (
            self.accelerator.distributed_type == DistributedType.DEEPSPEED
        )  # float16: the scaler skips such a step by itself, and DeepSpeed has made its step already
        if norm is not None and not scaled and not float(norm) < float("inf"):
            detail = ""
            if self._latest is not None and len(self._latest.weights):
                worst = int(self._latest.weights.argmax())
                ratio = float(self._latest.logps[worst] - self._latest.ref_logps[worst])
                detail = f" The largest weight in this batch is {float(self._latest.weights[worst]):.3g}, of sequence "
                detail += f"{worst} with the log-ratio {ratio:+.4g} nats."
            raise FloatingPointError(
                f"Step {self.state.global_step + 1}: the gradient's norm is {float(norm)} although the loss is finite."
                f"{detail} No weight was changed by this step. Lower the learning rate, cap the weight of rejected "
                f"responses with `max_log_weight`, or train in bfloat16 or float32 instead of float16."
            )
        return norm

    # --- the first step proves itself -----------------------------------------------------------------------------

    def _prove_first_step(self, result: PreferenceOutput, has_reference: bool) -> None:
        if self._first_step_proven or not self.model.training:
            return
        self._first_step_proven = True
        if self.state.global_step == 0 and has_reference and self.reference_is_the_start():
            dtype = first_step.largest_step(self.model, self._autocast_type())
            first_step.report(first_step.difference(result, dtype, self.objective.average), self.strict_checks)

    def _autocast_type(self) -> torch.dtype | None:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)

    def reference_of_fixed_tokens(self) -> list[float] | None:
        """Log-probabilities, nats, of the reference for two fixed rows of 16 tokens; None without a reference model."""
        asked = self.reference_for(self.model_wrapped)
        if asked is None or self.objective.reference == "none":
            return None
        vocabulary = causal_model(self.model).config.get_text_config().vocab_size
        ids = torch.arange(32, device=self.args.device).reshape(2, 16) * 7 % max(1, vocabulary - 8) + 3
        ids = ids.clamp(max=vocabulary - 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "use_cache": False}
        with self.accelerator.autocast():
            values: list[float] = reference_logps(asked[0], inputs, average=False, adapter=asked[1]).tolist()
        return values

    def compare_references(self, kept: list[float], now: list[float]) -> None:
        """Warn, or raise with strict checks, if the reference is not the one that the checkpoint knew."""
        values = torch.tensor([kept, now], dtype=torch.float64)
        allowed = first_step.bound(
            torch.full((2,), 15), values[0], first_step.largest_step(self.model, self._autocast_type())
        )
        if bool(((values[0] - values[1]).abs() > allowed).any()):
            first_step.report(
                f"The reference is not the one that this run began with: it gives fixed tokens the log-probabilities "
                f"{now}, the checkpoint says {kept}. Start the resumed run with the model (and `ref_model`) that the "
                f"first one started from, not with the checkpoint itself.",
                self.strict_checks,
            )

    # --- metrics --------------------------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Trainer's, with the metrics of this data set under its own prefix, and the loss over its pairs, each once."""
        outer, self._eval_sums = self._eval_sums, []
        try:
            output = super().evaluation_loop(  # type: ignore[misc]
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            if self._eval_sums:
                sums = self._gathered(self._eval_sums)
                values = {"loss": mean_loss(sums), **metrics(sums)}
                output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in values.items()})
        finally:
            self._eval_sums = outer
        return output

    def _gathered(self, batches: list[Tensor]) -> Tensor:
        """[R, 20]"""
        gathered: Tensor = self.accelerator.gather(merged(torch.stack(batches))[None])
        return gathered

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics of the steps since the last log to a log of training (one with `loss`)."""
        if "loss" in logs and self._train_sums:
            logs |= metrics(self._gathered(self._train_sums))
            self._train_sums = []
        self._log(logs, start_time)

    def _log(self, logs: dict[str, float], start_time: float | None) -> None:
        super().log(logs, start_time)  # type: ignore[misc]


def _refuse_shared_weights(model: Any, reference: Any) -> None:
    """A reference that is trained along gives log-ratios of 0 for ever."""
    frozen = {id(parameter) for parameter in reference.parameters()}
    shared = [name for name, p in model.named_parameters() if p.requires_grad and id(p) in frozen]
    if shared:
        raise ValueError(
            f"`ref_model` shares weights that are trained with the policy ({shared[0]} and {len(shared) - 1} more), so "
            f"that it would be trained along and every log-ratio be 0. Pass a model of its own "
            f"(copy.deepcopy(model), or load it again); a policy with an adapter needs none: leave `ref_model` out."
        )
