"""InfoPO on TRL: `InfoPOTrainer` and `InfoPOConfig` on top of `DPOTrainer` and `DPOConfig`.

    trainer = InfoPOTrainer(model, args=InfoPOConfig("out", beta=0.1), train_dataset=dataset)

Tested with trl 1.16. Data formats, tokenisation, reference model, PEFT, checkpoints, evaluation are TRL's own; loss,
log-probabilities and metrics are this library's.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Final

import torch
from torch import Tensor

from infopo_kernels.integrations.collators import PackedPreferenceCollator, PreferenceCollator
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
from infopo_kernels.reference_logps import ReferenceTable

try:
    from accelerate.utils import extract_model_from_parallel, is_peft_model
    from transformers import AutoProcessor, ProcessorMixin
    from trl import DPOConfig, DPOTrainer
    from trl.models.utils import disable_gradient_checkpointing
    from trl.trainer.utils import get_config_model_id, use_adapter
except ImportError as error:
    raise ImportError(
        "InfoPOTrainer and InfoPOConfig need the package `trl` (1.16 or later) with `transformers`, `accelerate` and "
        f"`datasets`; run: pip install 'infopo_kernels[trl]'. Reason: {error}"
    ) from error

_NO_MEANING: Final = {
    "loss_type": "the loss is InfoPO; for others see `infopo_kernels.linear_logps`. An SFT term is `sft_weight`",
    "loss_weights": "there is one loss; an SFT term is `sft_weight`",
    "ld_alpha": "LD-DPO reweights tokens by the other response's length; `average=True` removes the length",
    "f_divergence_type": "the bound is that of the KL divergence; there is no other form of it",
    "f_alpha_divergence_coef": "the bound is that of the KL divergence; there is no other form of it",
    "label_smoothing": "flipped labels enter DPO's sigmoid; cap their pull with `max_log_weight` instead",
    "use_weighting": "WPO's weights need the whole distribution of every token; InfoPO has its own, per sequence",
    "discopop_tau": "it belongs to the DiscoPOP loss",
}
"""Fields of `DPOConfig` that say nothing here, and why."""


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class InfoPOConfig(DPOConfig):
    """`DPOConfig` with InfoPO's hyper-parameters; `beta` and everything about model, data and training are TRL's.

    Args:
        offset, max_log_weight, min_log_weight, sft_weight, average: see `InfoPOOptions`.
        reference_free: no reference model; rewards are ``beta * logps``.
        skip_chosen_reference: leave the chosen reference out. It has no influence on the gradient; the loss is shifted,
            and metrics that need it are not logged. Halves the reference's work.
        reference_logps: file written by ``python -m infopo_kernels precompute-reference``; no reference model is
            loaded then. Model and pairs are compared with the file.
        share_prompt: with `padding_free`, chosen and rejected share their prompt in the pack.
        backend, workspace_mib: see `KernelOptions`.

    `padding_free=True` packs all sequences of a batch into one row, under any attention implementation of transformers.

    Raises:
        ValueError: a field of `DPOConfig` that has no meaning here was set, or two that contradict each other.
    """

    offset: float = _option(1.0, "Constant inside the exponential: 1 is the Nguyen-Wainwright-Jordan bound.")
    max_log_weight: float | None = _option(None, "Cap of the rejected weight at beta * exp(max_log_weight).")
    min_log_weight: float | None = _option(None, "Rejected sequences below beta * exp(min_log_weight) are left alone.")
    sft_weight: float = _option(0.0, "Weight of an added mean negative log-likelihood of the chosen response.")
    average: bool = _option(False, "Mean over the tokens of a response instead of their sum.")
    reference_free: bool = _option(False, "Train without a reference model.")
    skip_chosen_reference: bool = _option(False, "Leave the chosen reference out: same gradients, half the work.")
    reference_logps: str | None = _option(None, "File of reference log-probabilities computed ahead of time.")
    share_prompt: bool = _option(False, "With padding_free: one copy of the prompt for both responses.")
    backend: str = _option("auto", "Backend of the fused head: auto, cpp, triton or torch.")
    workspace_mib: int | None = _option(None, "Bound on the fused head's workspace, MiB.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for each in fields(DPOConfig):
            name, reason = each.name, _NO_MEANING.get(each.name)
            default = each.default if each.default is not MISSING else each.default_factory()  # type: ignore[misc, operator]
            if reason is not None and getattr(self, name) != default:
                raise ValueError(f"`{name}={getattr(self, name)!r}` has no meaning for InfoPO: {reason}. Leave it out.")
        self.infopo_options()
        self.kernel_options()
        if self.share_prompt and not self.padding_free:
            raise ValueError("`share_prompt=True` needs `padding_free=True`: prompts are shared inside a packed row.")
        if self.truncation_mode != "keep_start":
            raise ValueError("Sequences are cut at their end; leave `truncation_mode='keep_start'`.")
        if self.reference_free and (self.reference_logps or self.sync_ref_model or self.skip_chosen_reference):
            raise ValueError(
                "`reference_free=True` contradicts `reference_logps`, `sync_ref_model` and `skip_chosen_reference`; "
                "there is no reference."
            )
        if self.reference_free or self.reference_logps:
            self.precompute_ref_log_probs = True  # so that no reference model is loaded

    def infopo_options(self) -> InfoPOOptions:
        """Hyper-parameters of the objective."""
        return InfoPOOptions(
            self.beta, self.offset, self.max_log_weight, self.min_log_weight, self.sft_weight, self.average
        )

    def kernel_options(self) -> KernelOptions:
        """Backend and workspace."""
        return KernelOptions(self.backend, self.workspace_mib)


class InfoPOTrainer(DPOTrainer):
    """`DPOTrainer` with the InfoPO loss, formed from hidden states without logits.

    Takes what `DPOTrainer` takes (model or its name, `ref_model`, datasets in preference format, `peft_config`,
    callbacks, ...), with an `InfoPOConfig`. A dataset that holds `ref_chosen_logps` and `ref_rejected_logps` (only the
    latter with `skip_chosen_reference`) is not scored by a reference model when `precompute_ref_log_probs=True`.

    Logged beside TRL's `rewards/*`, `logps/*`, `num_tokens` and `aux_loss`: `mi_lower_bound`, `rejected_weight/mean`,
    `/max`, `/underflowed`, `/capped`, `scored_tokens`. TRL's `entropy`, `logits/*` and `mean_token_accuracy` are not:
    they need the whole distribution of every token, which is never formed.

    Raises:
        TypeError: `args` is not an `InfoPOConfig`, or the head cannot be served (see `attach_linear_logps`).
        ValueError: options that contradict the model or the data.
    """

    _tag_names = ["trl", "infopo"]  # noqa: RUF012
    _name = "InfoPO"
    _paper = {  # noqa: RUF012
        "title": "InfoPO: On Mutual Information Maximization for Large Language Model Alignment",
        "citation": "Teng Xiao et al., NAACL 2025",
    }

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **kwargs: Any) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = InfoPOConfig(f"{name.split('/')[-1]}-InfoPO")
        if not isinstance(args, InfoPOConfig):
            raise TypeError(f"`args` must be an InfoPOConfig, got {type(args).__name__}; it takes DPOConfig's fields.")
        if args.reference_free and ref_model is not None:
            raise ValueError("`ref_model` was given with `reference_free=True`; leave one of them out.")
        self._infopo, self._kernel = args.infopo_options(), args.kernel_options()
        packed = args.padding_free
        if kwargs.get("data_collator") is None and not _has_images(kwargs.get("train_dataset")):
            kwargs["processing_class"] = _processing_class(kwargs.get("processing_class"), model, args)
            kwargs["data_collator"] = _collator(kwargs["processing_class"], args)
        elif packed:
            raise ValueError("`padding_free=True` has its own collator for text; leave `data_collator` and images out.")
        if packed and kwargs.get("compute_metrics") is not None:
            raise ValueError("`compute_metrics` takes padded logits; it does not go with `padding_free=True`.")
        args.padding_free = False  # DPOTrainer would switch it off with a warning
        try:
            super().__init__(model, ref_model=ref_model, args=args, **kwargs)
        finally:
            args.padding_free = packed

    # Models are attached the moment they are set, before Accelerate, FSDP or DeepSpeed wrap them.

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
        self._reference_model = _attached(value, self._kernel)

    def _without_reference_model(self, dataset: Any) -> Any | None:
        """The dataset if it needs no reference model, or has what the reference model would say; else None."""
        if self.args.reference_free:
            return dataset
        names = dataset.column_names or []
        if "ref_rejected_logps" in names and ("ref_chosen_logps" in names or self.args.skip_chosen_reference):
            return dataset
        return None

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if (ready := self._without_reference_model(dataset)) is not None:
            return ready
        if self.args.reference_logps:
            table = ReferenceTable.read(self.args.reference_logps)
            table.check_model(self.model)
            table.check_options(
                average=self.args.average, max_length=self.args.max_length, skip_chosen=self.args.skip_chosen_reference
            )
            return dataset.map(table.lookup, desc=f"Reading reference log probs for {name} dataset")
        # TRL caches by model and data; what is summed depends on these too.
        kept: Any = vars(self)["_precompute_model_hash"]
        self._precompute_model_hash = (kept, "infopo", self.args.average, self.args.skip_chosen_reference)
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self._precompute_model_hash = kept

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> tuple[Tensor, Tensor]:
        """Reference log-probabilities of a batch, float64, chosen and rejected."""
        with self.accelerator.autocast():
            chosen, rejected = self._reference(model, split_inputs(inputs)[0]).chunk(2)
        return chosen, rejected

    def _reference(self, model: Any, model_inputs: Any) -> Tensor:
        adapter = None
        if self.ref_model is None and is_peft_model(self.model):
            unwrapped = self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(unwrapped, "ref" if "ref" in unwrapped.peft_config else None)
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            return reference_logps(
                model,
                {**model_inputs, "use_cache": False},
                average=self._infopo.average,
                skip_chosen=self.args.skip_chosen_reference,
                adapter=adapter,
            )

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        mode = "train" if self.model.training else "eval"
        model_inputs, known = split_inputs(inputs)
        if self.args.reference_free:
            known.pop("ref_logps", None)
        elif "ref_logps" not in known:
            reference = model if self.ref_model is None else self.ref_model
            known["ref_logps"] = self._reference(reference, model_inputs)
        if self.aux_loss_enabled:
            model_inputs["output_router_logits"] = True
        out = infopo_output(
            model, model_inputs, known, self._infopo, skip_chosen_reference=self.args.skip_chosen_reference
        )
        loss = out.infopo.loss
        if self.aux_loss_enabled:  # with TRL's coefficient, which the user may have set
            loss = loss + self.router_aux_loss_coef * out.aux_loss
            aux_loss = self.accelerator.gather_for_metrics(out.aux_loss.detach())
            self._metrics[mode]["aux_loss"].append(aux_loss.mean().item())
        self._log_batch(mode, out, inputs)
        if not return_outputs:
            return loss
        drop = ("labels", "cu_seqlens", "rows", "output_router_logits")
        with torch.no_grad():
            return loss, model(**{key: value for key, value in model_inputs.items() if key not in drop})

    def _log_batch(self, mode: str, out: Any, inputs: Any) -> None:
        gathered = self.accelerator.gather(metric_sums(out.infopo, self._infopo)[None])
        for name, value in metrics(gathered).items():
            self._metrics[mode][name].append(value)
        if mode == "train":
            mask = inputs.get("attention_mask")
            padded = mask is not None and mask.ndim == 2
            tokens = mask.sum() if padded else torch.tensor(inputs["input_ids"].numel(), device=self.accelerator.device)
            self._total_train_tokens += self.accelerator.gather_for_metrics(tokens).sum().item() // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]


def _attached(model: Any, kernel: KernelOptions) -> Any:
    """The model, attached unless it is already, inside whatever wraps it."""
    if model is not None and not is_attached(extract_model_from_parallel(model, keep_torch_compile=False)):
        attach_linear_logps(model, kernel=kernel)
    return model


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
    tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return PreferenceCollator(args.max_length, pad_token_id=pad or 0, pad_to_multiple_of=args.pad_to_multiple_of)
