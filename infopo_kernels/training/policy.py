"""A causal language model whose head is the fused op: hidden states in, log-probabilities or the loss out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infopo_kernels.functional import InfoPOOutput, linear_infopo_loss, linear_logps
from infopo_kernels.options import InfoPOOptions, KernelOptions, LogitOptions
from infopo_kernels.training.batches import Batch, collate
from infopo_kernels.training.errors import UserError
from infopo_kernels.training.smollm2 import SMOLLM2, smollm2_directory
from infopo_kernels.training.tokens import Example


@dataclass(frozen=True)
class Loading:
    """How a model is loaded and what of it is trained."""

    dtype: torch.dtype = torch.float32
    """Of activations and products. Weights that are trained stay in float32 (bfloat16 runs under autocast): a step of
    1e-5 is lost in a bfloat16 weight. With LoRA the frozen weights take this type too."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    lora_rank: int | None = None
    """None tunes every weight; else LoRA of this rank on every linear layer but the head."""
    lora_alpha: float | None = None
    """None takes twice the rank."""
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False


class Policy:
    """A model from transformers, run without ever forming its logits."""

    def __init__(self, model: Any, tokenizer: Any, loading: Loading, kernel: KernelOptions) -> None:
        """`model` is an `AutoModelForCausalLM`, or a `PeftModel` around one.

        Raises:
            UserError: its head is not a plain linear layer.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.loading = loading
        self.kernel = kernel
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._decoder: Callable[..., Any] = causal.get_decoder()
        self._head = causal.get_output_embeddings()
        if type(self._head) is not nn.Linear:
            raise UserError(
                f"the model's head is a {type(self._head).__name__}, not a plain linear layer; its log-probabilities "
                f"cannot be formed by the fused op. Use a model with an unquantised head and no adapter on it."
            )
        self._logit = _logit_options(causal.config.get_text_config())

    @classmethod
    def load(cls, name: str, loading: Loading, kernel: KernelOptions, tokenizer: Any = None) -> Policy:
        """From a directory, a hub id, or "smollm2" (the model of the demo).

        Raises:
            UserError: there is no such model, or it is not a causal language model.
        """
        from transformers import AutoModelForCausalLM

        frozen = loading.lora_rank is not None
        model = _from_pretrained(
            AutoModelForCausalLM, name, loading, dtype=loading.dtype if frozen else torch.float32
        ).to(loading.device)
        if loading.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if frozen:
            model = _with_lora(model, loading)
        return cls(model, tokenizer or load_tokenizer(name, loading), loading, kernel)

    @property
    def pad_token_id(self) -> int:
        """What padding is filled with; its value has no influence."""
        token = self.tokenizer.pad_token_id
        return int(token) if token is not None else int(self.tokenizer.eos_token_id or 0)

    @property
    def vocabulary(self) -> int:
        """V."""
        return int(self._head.weight.shape[0])

    @property
    def width(self) -> int:
        """H."""
        return int(self._head.weight.shape[1])

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What the optimiser gets."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.loading.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.loading.device.type, dtype=self.loading.dtype)

    def _head_arguments(self, batch: Batch) -> dict[str, Any]:
        hidden = self._decoder(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).last_hidden_state
        return {
            "hidden": hidden,
            "weight": self._head.weight,
            "labels": batch.labels,
            "bias": self._head.bias,
            "shift": True,
            "softcap": self._logit.softcap,
            "logit_scale": self._logit.logit_scale,
            "backend": self.kernel.backend,
            "workspace_mib": self.kernel.workspace_mib,
        }

    def logps(self, batch: Batch, average: bool = False) -> Tensor:
        """Log-probabilities of the responses, [2B] float64, nats: sums, or means over their tokens. Differentiable."""
        with self._autocast():
            return linear_logps(**self._head_arguments(batch), reduction="mean" if average else "sum")

    def infopo(self, batch: Batch, ref_logps: Tensor, options: InfoPOOptions, num_pairs: int) -> InfoPOOutput:
        """The InfoPO loss of the batch against `ref_logps` [2B], averaged over `num_pairs`."""
        with self._autocast():
            return linear_infopo_loss(
                **self._head_arguments(batch),
                ref_logps=ref_logps,
                num_pairs=num_pairs,
                beta=options.beta,
                offset=options.offset,
                max_log_weight=options.max_log_weight,
                min_log_weight=options.min_log_weight,
                sft_weight=options.sft_weight,
                average=options.average,
            )

    @torch.no_grad()
    def check_examples(self, examples: Sequence[Example], tokens: int = 16) -> None:
        """Compare the fused log-probabilities of a few tokens with the model's own logits.

        A model may do something to its logits that its configuration does not say; training on would be silently wrong.

        Raises:
            UserError: they differ.
        """
        batch = collate(examples[:1], self.pad_token_id, self.loading.device)
        ids, mask = batch.input_ids[:1, : tokens + 1], batch.attention_mask[:1, : tokens + 1]
        self.model.eval()
        with self._autocast():
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            own = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
            fused = linear_logps(**self._head_arguments(Batch(ids, mask, ids)))[:, :-1].float()
        difference = ((fused - own).abs() * mask[:, 1:]).max().item()
        # A step of bfloat16 at a logit of 32 is 0.25; the model's own logits carry it, the fused ones do not.
        allowed = 0.02 if logits.dtype == torch.float32 else 0.5
        if not difference <= allowed:
            raise UserError(
                f"the fused head's log-probabilities differ from the model's own by {difference:.3g} nats (allowed: "
                f"{allowed}): {type(self.model).__name__} does something to its logits that is not known here."
            )

    def save(self, directory: Path, merge_adapter: bool = False) -> None:
        """Model (with LoRA: the adapter, or the merged model) and tokenizer, loadable by `from_pretrained`."""
        model = self.model.merge_and_unload() if merge_adapter else self.model
        model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)


def _logit_options(config: Any) -> LogitOptions:
    """What the families of models do to their logits, under the names of their configurations."""
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # Falcon-H1
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    return LogitOptions(softcap=getattr(config, "final_logit_softcapping", None), logit_scale=scale)  # Gemma


def _from_pretrained(factory: Any, name: str, loading: Loading, **kwargs: Any) -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()  # the commands show their own
    source = str(smollm2_directory()) if name == SMOLLM2 and not Path(name).exists() else name
    try:
        return factory.from_pretrained(source, trust_remote_code=loading.trust_remote_code, **kwargs)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 300 else reason[:297] + "..."
        raise UserError(
            f"`--model {name}` cannot be loaded; pass a directory written by save_pretrained, the id of a causal "
            f"language model on the hub, or {SMOLLM2!r}. Reason: {reason}"
        ) from error


def load_tokenizer(name: str, loading: Loading) -> Any:
    """The tokenizer of `name` (see `Policy.load`).

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, name, loading)


def _with_lora(model: Any, loading: Loading) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("`--lora-rank` needs the package `peft`; run: pip install peft") from None
    if loading.gradient_checkpointing:
        model.enable_input_require_grads()  # else nothing before the first adapter asks for a gradient
    assert loading.lora_rank is not None
    alpha = 2 * loading.lora_rank if loading.lora_alpha is None else loading.lora_alpha
    config = LoraConfig(
        task_type="CAUSAL_LM", r=loading.lora_rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear"
    )
    return get_peft_model(model, config)
