"""InfoPO on TRL: `InfoPOTrainer` and `InfoPOConfig` on top of `DPOTrainer` and `DPOConfig`.

    trainer = InfoPOTrainer(model, args=InfoPOConfig("out", beta=0.1), train_dataset=dataset)

Tested with trl 1.16. TRL does the reference model, PEFT, checkpoints and evaluation; this library does the data, loss,
log-probabilities, metrics and checks.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Final

import torch
from torch import Tensor, nn

from infopo_kernels.integrations.adapters import check_start
from infopo_kernels.integrations.collators import PackedPreferenceCollator, PreferenceCollator, pad_token_id
from infopo_kernels.integrations.preferences import by_feature, feature_dataset, lists_rejected
from infopo_kernels.integrations.references import ReferenceTable
from infopo_kernels.integrations.step import LAYOUT_KEYS, number_of_chosen, reference_logps, split_inputs
from infopo_kernels.integrations.transformers import attach_linear_logps, is_attached
from infopo_kernels.libraries import import_failure, require_methods, warn_untested
from infopo_kernels.objectives import DPO, IPO, SFT, InfoPO, Objective, SimPO
from infopo_kernels.options import KernelOptions

try:
    from accelerate.utils import gather_object, is_peft_model
    from transformers import AutoProcessor
    from trl import DPOConfig, DPOTrainer
    from trl.models.utils import disable_gradient_checkpointing
    from trl.trainer.utils import get_config_model_id, use_adapter

    from infopo_kernels.integrations.first_step import computing_type
    from infopo_kernels.integrations.preference_training import OVERRIDDEN, PreferenceTraining
    from infopo_kernels.integrations.randomness import check_no_neftune
except ImportError as error:
    raise import_failure(__name__, ("trl", "transformers", "accelerate", "datasets"), "trl", error) from error
warn_untested("trl", "transformers", "accelerate", "datasets", "peft")
require_methods("transformers", DPOTrainer, OVERRIDDEN)
require_methods("trl", DPOTrainer, ("_prepare_dataset", "_precompute_ref_logps", "_compute_loss"))

_LOSSES: Final = ("infopo", "sigmoid", "ipo", "simpo", "sft")
"""Values of `loss_type`, under TRL's names where it has one: "sigmoid" is DPO."""

_NO_MEANING: Final = {
    "loss_weights": "there is one loss; an SFT term is `sft_weight`",
    "ld_alpha": "LD-DPO reweights tokens by the other response's length; `average=True` removes the length",
    "f_divergence_type": "the bound is that of the KL divergence; there is no other form of it",
    "f_alpha_divergence_coef": "the bound is that of the KL divergence; there is no other form of it",
    "label_smoothing": "flipped labels enter DPO's sigmoid; cap their pull with `max_log_weight` instead",
    "use_weighting": "WPO's weights need the whole distribution of every token; InfoPO has its own, per sequence",
    "discopop_tau": "it belongs to the DiscoPOP loss",
}
"""Fields of `DPOConfig` that have no meaning here, and why."""

_OF_INFOPO: Final = ("offset", "max_log_weight", "min_log_weight", "sft_weight", "skip_chosen_reference")
"""Fields that belong to InfoPO only."""


def option(default: Any, text: str) -> Any:
    """A field of a dataclass of options, with its text for --help."""
    return field(default=default, metadata={"help": text})


@dataclass
class InfoPOConfig(DPOConfig):
    """`DPOConfig` with InfoPO's hyper-parameters; `beta` and everything about model, data and training are TRL's.

    Args:
        loss_type: "infopo"; or another fused objective: "sigmoid" (DPO), "ipo", "simpo", "sft".
        offset, max_log_weight, min_log_weight, sft_weight, average: see `InfoPO`.
        simpo_gamma: target margin of SimPO.
        reference_free: no reference model; rewards are ``beta * logps``.
        skip_chosen_reference: leave the chosen reference out. It has no influence on the gradient; the loss is shifted,
            and metrics that need it are not logged. Halves the reference's work.
        reference_logps: file written by ``python -m infopo_kernels precompute-reference``; no reference model is
            loaded then. Model and pairs are compared with the file.
        share_prompt: with `padding_free`, chosen and rejected share their prompt in the pack.
        score_turns: "assistant" leaves user and tool turns inside a response unscored; see `preferences.encode`.
        strict_checks: errors instead of warnings from the checks of the first step (docs/checks.md).
        backend, workspace_mib, tail_threshold: see `KernelOptions`.

    `padding_free=True` packs all sequences of a batch into one row, under any attention implementation of transformers.
    `disable_dropout=True`, TRL's default, switches off dropout and all other noise in the forward.

    Raises:
        ValueError: a field of `DPOConfig` that has no meaning here was set, or two that contradict each other.
    """

    loss_type: list[str] = field(
        default_factory=lambda: ["infopo"],
        metadata={"help": f"Loss: one of {', '.join(_LOSSES)}; sigmoid is DPO."},
    )
    offset: float = option(1.0, "Constant inside the exponential: 1 is the Nguyen-Wainwright-Jordan bound.")
    max_log_weight: float | None = option(None, "Cap of the rejected weight at beta * exp(max_log_weight).")
    min_log_weight: float | None = option(None, "Rejected sequences below beta * exp(min_log_weight) are left alone.")
    sft_weight: float = option(0.0, "Weight of an added mean negative log-likelihood of the chosen response.")
    average: bool = option(False, "Mean over the tokens of a response instead of their sum.")
    simpo_gamma: float = option(1.0, "Target margin of the rewards, of loss_type simpo.")
    reference_free: bool = option(False, "Train without a reference model.")
    skip_chosen_reference: bool = option(False, "Leave the chosen reference out: same gradients, half the work.")
    reference_logps: str | None = option(None, "File of reference log-probabilities computed ahead of time.")
    share_prompt: bool = option(False, "With padding_free: one copy of the prompt for both responses.")
    score_turns: str = option("all", "Turns of a response that are scored: all, or assistant.")
    strict_checks: bool = option(False, "Stop where a check of the first step would warn.")
    backend: str = option("auto", "Backend of the fused head: auto, cpp, triton or torch.")
    workspace_mib: int | None = option(None, "Bound on the fused head's workspace, MiB.")
    tail_threshold: float = option(0.0, "Words below this probability share a column of the gradient; 0 is exact.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for each in fields(DPOConfig):
            name, reason = each.name, _NO_MEANING.get(each.name)
            default = each.default if each.default is not MISSING else each.default_factory()  # type: ignore[misc, operator]
            if reason is not None and getattr(self, name) != default:
                raise ValueError(f"`{name}={getattr(self, name)!r}` has no meaning for InfoPO: {reason}. Leave it out.")
        if len(self.loss_type) != 1 or self.loss_type[0] not in _LOSSES:
            raise ValueError(
                f"`loss_type` must be one of {', '.join(_LOSSES)}, got {self.loss_type}; TRL's other losses, and sums "
                f"of several, run on `infopo_kernels.linear_logps`."
            )
        if self.loss_type[0] != "infopo":
            for name in _OF_INFOPO:
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ValueError(
                        f"`{name}={getattr(self, name)!r}` belongs to InfoPO, and `loss_type` is "
                        f"{self.loss_type[0]!r}; leave one of them out."
                    )
        self.objective()
        self.kernel_options()
        if self.share_prompt and not self.padding_free:
            raise ValueError("`share_prompt=True` needs `padding_free=True`: prompts are shared inside a packed row.")
        if self.truncation_mode != "keep_start":
            raise ValueError("Sequences are cut at their end; leave `truncation_mode='keep_start'`.")
        if self.score_turns not in ("all", "assistant"):
            raise ValueError(f"`score_turns` must be 'all' or 'assistant', got {self.score_turns!r}.")
        if self.reference_free and (self.reference_logps or self.sync_ref_model or self.skip_chosen_reference):
            raise ValueError(
                "`reference_free=True` contradicts `reference_logps`, `sync_ref_model` and `skip_chosen_reference`; "
                "there is no reference."
            )
        if self.reference_logps and self.sync_ref_model:
            raise ValueError("`reference_logps` holds a reference that stays; leave `sync_ref_model` out.")
        if self.disable_dropout and self.neftune_noise_alpha:
            check_no_neftune(nn.Module(), self.neftune_noise_alpha)

    def objective(self) -> Objective:
        """The objective that `loss_type` names, with its hyper-parameters."""
        kind = self.loss_type[0]
        if kind == "sigmoid":
            return DPO(self.beta, self.average)
        if kind == "ipo":
            return IPO(self.beta)
        if kind == "simpo":
            return SimPO(self.beta, self.simpo_gamma)
        if kind == "sft":
            return SFT()
        return InfoPO(self.beta, self.offset, self.max_log_weight, self.min_log_weight, self.sft_weight, self.average)

    def kernel_options(self) -> KernelOptions:
        """Backend, workspace and threshold of the tail."""
        return KernelOptions(self.backend, self.workspace_mib, self.tail_threshold)


class _NoReference(nn.Module):
    """Given to `DPOTrainer` as `ref_model`, so that it loads none; the trainer's `ref_model` is None then."""


class InfoPOTrainer(PreferenceTraining, DPOTrainer):  # type: ignore[misc]
    """`DPOTrainer` with the InfoPO loss (or another, by `loss_type`), formed from hidden states without logits.

    Takes what `DPOTrainer` takes (model or its name, `ref_model`, datasets in preference format, `peft_config`,
    callbacks, ...), with an `InfoPOConfig`. Rows may list several rejected responses, and have a `weight`. No reference
    model is loaded where none is needed: with `reference_free`, `reference_logps`, a loss without reference, or
    datasets that hold `ref_chosen_logps` and `ref_rejected_logps` (only the latter with `skip_chosen_reference`).

    Logged beside TRL's `rewards/*`, `logps/*`, `num_tokens` and `aux_loss`: `mi_lower_bound`, `rejected_weight/mean`,
    `/max`, `/underflowed`, `/capped`, `scored_tokens`, and with a `tail_threshold` `tail/mass_mean`, `/mass_max`,
    `/kept_share`. TRL's `entropy`, `logits/*` and `mean_token_accuracy` are not:
    they need the whole distribution of every token, which is never formed.

    Raises:
        TypeError: `args` is not an `InfoPOConfig`, or the head cannot be served (see `attach_linear_logps`).
        ValueError: options that contradict the model or the data; split sequences that cannot be served (see
            `SplitSequences.check`).
        FloatingPointError: while training, a loss or a gradient that is not finite; no weight is changed by that step.
        RuntimeError: the model's attached forward was lost; with `strict_checks`, a first step that is not the
            reference's.
    """

    _tag_names = ["trl", "infopo"]  # noqa: RUF012
    _name = "InfoPO"
    _paper = {  # noqa: RUF012
        "title": "InfoPO: On Mutual Information Maximization for Large Language Model Alignment",
        "citation": "Teng Xiao et al., NAACL 2025",
    }

    _counted: Tensor | int = 0
    """Tokens since they were last read, on the device."""

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **kwargs: Any) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = InfoPOConfig(f"{name.split('/')[-1]}-InfoPO")
        if not isinstance(args, InfoPOConfig):
            raise TypeError(f"`args` must be an InfoPOConfig, got {type(args).__name__}; it takes DPOConfig's fields.")
        if args.reference_free and ref_model is not None:
            raise ValueError("`ref_model` was given with `reference_free=True`; leave one of them out.")
        check_start(model)
        self.objective, self._kernel = args.objective(), args.kernel_options()
        self.strict_checks, self.skip_chosen_reference = args.strict_checks, args.skip_chosen_reference
        self._table = ReferenceTable.read(args.reference_logps) if args.reference_logps else None
        if self._table is not None:
            self._table.check_options(
                average=self.objective.average, max_length=args.max_length, skip_chosen=args.skip_chosen_reference
            )  # before a model is loaded; its type and weights, below
        packed, images = args.padding_free, _has_images(kwargs.get("train_dataset"))
        if kwargs.get("data_collator") is None and not images:
            kwargs["processing_class"] = _processing_class(kwargs.get("processing_class"), model, args)
            kwargs["data_collator"] = _collator(kwargs["processing_class"], args)
        elif packed:
            raise ValueError("`padding_free=True` has its own collator for text; leave `data_collator` and images out.")
        if packed and kwargs.get("compute_metrics") is not None:
            raise ValueError("`compute_metrics` takes padded logits; it does not go with `padding_free=True`.")
        given = ref_model
        if ref_model is None and self._needs_no_reference(kwargs, args):
            ref_model = _NoReference()
        args.padding_free = False  # DPOTrainer would switch it off with a warning
        try:
            super().__init__(model, ref_model=ref_model, args=args, **kwargs)
        finally:
            args.padding_free = packed
        if self._table is not None:
            self._table.check_model(self.model)
            self._table.check_options(
                average=self.objective.average,
                max_length=args.max_length,
                skip_chosen=args.skip_chosen_reference,
                dtype=computing_type(self.model, self._autocast_type()),
            )
        self._check_data(args.max_length)
        self._prepare_preferences(self.ref_model, given, dropout=not args.disable_dropout)

    def _needs_no_reference(self, kwargs: dict[str, Any], args: Any) -> bool:
        if args.reference_free or self.objective.reference == "none" or self._table is not None:
            return True
        evaluations = kwargs.get("eval_dataset")
        evaluations = list(evaluations.values()) if isinstance(evaluations, dict) else [evaluations]
        given = [kwargs.get("train_dataset"), *evaluations]
        return all(self._holds_references(dataset) for dataset in given if dataset is not None)

    def _holds_references(self, dataset: Any) -> bool:
        row: dict[str, Any] = next(iter(dataset), {})
        return "ref_rejected_logps" in row and ("ref_chosen_logps" in row or self.skip_chosen_reference)

    # Setting a model attaches it, before Accelerate, FSDP or DeepSpeed wrap it.

    @property
    def model(self) -> Any:
        """The policy."""
        return self._policy

    @model.setter
    def model(self, value: Any) -> None:
        self._policy = _attached(value, self._kernel)

    @property
    def ref_model(self) -> Any:
        """The reference model, or None."""
        return self._reference_model

    @ref_model.setter
    def ref_model(self, value: Any) -> None:
        self._reference_model = _attached(None if isinstance(value, _NoReference) else value, self._kernel)

    # --- data -----------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Features of a dataset or a stream, with the references of the file, if there is one."""
        features = feature_dataset(
            dataset,
            processing_class,
            args.max_length,
            score_turns=args.score_turns,
            num_proc=args.dataset_num_proc,
            name=dataset_name,
        )
        if self._table is None or self._holds_references(features):
            return features
        return features.map(self._table.lookup)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Trainer's, of features: TRL prepares rows of text for `evaluate` only."""
        row = test_dataset[0] if hasattr(test_dataset, "__len__") and len(test_dataset) else None
        if isinstance(row, dict) and "chosen" in row and row.get("chosen_ids") is None and not self._is_vision_dataset:
            raise ValueError(
                f"`test_dataset` must hold features (`prompt_ids`, `chosen_ids`, `rejected_ids`), got rows of text "
                f"({', '.join(row)}); call evaluate(dataset, metric_key_prefix='test'), which prepares them, or make "
                f"features with feature_dataset."
            )
        return super().get_test_dataloader(test_dataset)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if self._needs_no_reference({"train_dataset": dataset}, self.args):
            return dataset
        if not hasattr(dataset, "__len__"):
            raise ValueError(
                f"`precompute_ref_log_probs=True` scores all pairs ahead, and the {name} dataset is a stream; "
                f"leave it out, or score the data once with `python -m infopo_kernels precompute-reference` and pass "
                f"`reference_logps`, which serves streams too."
            )
        if not dataset.cache_files or _lists_rejected(dataset):  # TRL's cache holds one value a pair
            return self._precompute_in_memory(dataset, batch_size)
        # TRL caches by model and data; what is summed depends on these too.
        kept: Any = vars(self)["_precompute_model_hash"]
        self._precompute_model_hash = (kept, "infopo", self.objective.average, self.skip_chosen_reference)
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self._precompute_model_hash = kept

    def _precompute_in_memory(self, dataset: Any, batch_size: int) -> Any:
        """Without TRL's cache file, which lies in a temporary directory of each process."""
        R, rank = self.accelerator.num_processes, self.accelerator.process_index
        size = -(-len(dataset) // (batch_size * R)) * batch_size
        # Every rank makes as many passes, since sharded weights travel in each; so some rows are scored twice.
        own = [index % len(dataset) for index in range(rank * size, (rank + 1) * size)]
        model = self.ref_model or self.model
        several = _lists_rejected(dataset)
        values: list[tuple[float, Any]] = []
        for start in range(0, size, batch_size):
            rows = [dataset[index] for index in own[start : start + batch_size]]
            inputs = self._prepare_inputs(self.data_collator(rows))
            chosen, rejected = (each.tolist() for each in self.compute_ref_log_probs(model, inputs))
            values += zip(chosen, by_feature(rows, rejected) if several else rejected, strict=True)
        found = (gather_object(values) if R > 1 else values)[: len(dataset)]
        names = ("ref_chosen_logps", "ref_rejected_logps")
        for name, column in zip(names, zip(*found, strict=True), strict=True):
            dataset = dataset.add_column(name, list(column))
        return dataset

    # --- the step -------------------------------------------------------------------------------------------------

    def reference_for(self, model: Any) -> tuple[Any, Any] | None:
        """`ref_model`, or the model with the adapter that training starts from, or with none."""
        if self.args.reference_free or self._table is not None or self.objective.reference == "none":
            return None
        if self.ref_model is not None:
            return self.ref_model, None
        if not is_peft_model(self.model):
            return None
        unwrapped = self.accelerator.unwrap_model(self.model)
        return model, use_adapter(unwrapped, "ref" if "ref" in unwrapped.peft_config else None)

    def reference_is_the_start(self) -> bool:
        """As in every trainer; but the adapter "ref" is the one that training starts from, virtual tokens or not."""
        return self._is_start if "ref" in getattr(self.model, "peft_config", {}) else super().reference_is_the_start()

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> tuple[Tensor, Tensor]:
        """Reference log-probabilities of a batch, float64, chosen and rejected."""
        model_inputs, known = split_inputs(inputs)
        num_chosen, asked = number_of_chosen(model_inputs, known), self.reference_for(model)
        with self.accelerator.autocast():
            logps = reference_logps(
                model,
                {**model_inputs, "use_cache": False},
                average=self.objective.average,
                skip_chosen=self.skip_chosen_reference,
                num_chosen=num_chosen,
                adapter=None if asked is None else asked[1],
            )
        return logps[:num_chosen], logps[num_chosen:]

    def _reference_logps(self, model: Any, model_inputs: Any, known: Any) -> Tensor:
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            return super()._reference_logps(model, model_inputs, known)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        mode = "train" if self._eval_sums is None else "eval"
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        out, result = self.preference_loss(model, inputs, **router)
        loss = result.loss
        if self.aux_loss_enabled:  # with TRL's coefficient, which the user may have set
            assert out.aux_loss is not None
            loss = loss + self.router_aux_loss_coef * out.aux_loss
            aux_loss = self.accelerator.gather_for_metrics(out.aux_loss.detach())
            self._metrics[mode]["aux_loss"].append(aux_loss.mean())
        if mode == "train":
            self._count_tokens(inputs)
        if not return_outputs:
            return loss
        model_inputs = split_inputs(inputs)[0]
        with torch.no_grad():
            return loss, model(**{key: value for key, value in model_inputs.items() if key not in LAYOUT_KEYS})

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """DPOTrainer's, in parts under context parallelism."""
        context, inputs = self._in_parts(model, inputs)
        with context:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _count_tokens(self, inputs: Any) -> None:
        """Add the batch to what is counted on the device, which is read when a log wants it (TRL reads every step)."""
        mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
        padded = mask is not None and mask.ndim == 2
        tokens = mask.sum() if padded else torch.full((), ids.numel(), device=ids.device)
        self._counted = self._counted + self.accelerator.gather_for_metrics(tokens).sum()

    def _taken(self, mode: str) -> dict[str, float]:
        """Means of what was noted beside the loss since they were last taken, and the tokens of training."""
        self._total_train_tokens += int(self._counted) // self._tp_size
        self._counted = 0
        taken = {name: float(sum(values) / len(values)) for name, values in self._metrics[mode].items()}
        self._metrics[mode].clear()
        return {**taken, "num_tokens": float(self._total_train_tokens)}

    # --- metrics --------------------------------------------------------------------------------------------------

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Adds what is counted beside the loss, under the prefix of this data set."""
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in self._taken("eval").items()})
        return output

    def _log(self, logs: dict[str, float], start_time: float | None) -> None:
        if "loss" in logs:
            logs |= self._taken("train")
        super(DPOTrainer, self).log(logs, start_time)  # DPOTrainer's would guess the prefix from the model's mode


def _attached(model: Any, kernel: KernelOptions) -> Any:
    """The model, attached unless it is already, inside whatever wraps it."""
    if model is not None and not is_attached(model):
        attach_linear_logps(model, kernel=kernel)
    return model


def _lists_rejected(dataset: Any) -> bool:
    return "rejected_ids" in dataset.column_names and lists_rejected(dataset[0])


def _has_images(dataset: Any) -> bool:
    if dataset is None:
        return False
    example = next(iter(dataset))
    return "image" in example or "images" in example


def _processing_class(given: Any, model: Any, args: Any) -> Any:
    """The tokenizer or processor, loaded as DPOTrainer would."""
    if given is not None:
        return given
    init = args.model_init_kwargs or {}
    source = model if isinstance(model, str) else get_config_model_id(model.config)
    revision = init.get("revision") if isinstance(model, str) else None
    return AutoProcessor.from_pretrained(source, revision=revision, trust_remote_code=args.trust_remote_code)


def _collator(processing_class: Any, args: Any) -> Any:
    if args.padding_free:
        return PackedPreferenceCollator(args.max_length, share_prompt=args.share_prompt)
    pad = pad_token_id(processing_class)
    return PreferenceCollator(args.max_length, pad_token_id=pad, pad_to_multiple_of=args.pad_to_multiple_of)
