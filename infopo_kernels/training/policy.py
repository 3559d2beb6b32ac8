"""A causal language model whose head is the fused op: hidden states in, log-probabilities or the loss out."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infopo_kernels.integrations.transformers import attach_linear_logps
from infopo_kernels.objectives import InfoPOOptions
from infopo_kernels.options import KernelOptions
from infopo_kernels.output import InfoPOOutput
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
        """`model` is an `AutoModelForCausalLM`, or a `PeftModel` around one; the fused head is attached to it.

        Raises:
            UserError: its head is not one that the fused op can serve.
        """
        try:
            self.model = attach_linear_logps(model, kernel=kernel)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error
        self.tokenizer = tokenizer
        self.loading = loading

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
            # Newer versions of transformers call it by another name, and warn of the old one.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        if frozen:
            model = _with_lora(model, loading)
        return cls(model, tokenizer or load_tokenizer(name, loading), loading, kernel)

    @property
    def pad_token_id(self) -> int:
        """What padding is filled with; its value has no influence."""
        token = self.tokenizer.pad_token_id
        return int(token) if token is not None else int(self.tokenizer.eos_token_id or 0)

    @property
    def head_shape(self) -> tuple[int, int]:
        """V, H."""
        vocabulary, width = self.model.get_output_embeddings().weight.shape
        return vocabulary, width

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What the optimiser gets."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.loading.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.loading.device.type, dtype=self.loading.dtype)

    def _forward(self, batch: Batch, **request: Any) -> Any:
        with self._autocast():
            return self.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, **request
            )

    def logps(self, batch: Batch, average: bool = False) -> Tensor:
        """Log-probabilities of the responses, [2B] float64, nats: sums, or means over their tokens. Differentiable."""
        logps: Tensor = self._forward(batch, linear_logps="mean" if average else "sum").logps
        return logps

    def infopo(
        self,
        batch: Batch,
        ref_logps: Tensor,
        options: InfoPOOptions,
        num_pairs: int,
        skip_chosen_reference: bool = False,
    ) -> tuple[Tensor, InfoPOOutput]:
        """The InfoPO loss of the batch against `ref_logps` [2B], averaged over `num_pairs`, and what it consists of.

        The first differs from the second's `loss` by the auxiliary loss of a mixture of experts. With
        `skip_chosen_reference` the chosen half of `ref_logps` is left alone (see `linear_infopo_loss`).
        """
        output = self._forward(
            batch, infopo=options, ref_logps=ref_logps, num_pairs=num_pairs, skip_chosen_reference=skip_chosen_reference
        )
        return output.loss, output.infopo

    @torch.no_grad()
    def check_examples(self, examples: Sequence[Example]) -> None:
        """Run the first of them, so that a model that cannot be served is refused before the work begins.

        Raises:
            UserError: the model does something to its logits that is not known; training on would be silently wrong.
        """
        self.model.eval()
        try:
            self.logps(collate(examples[:1], self.pad_token_id, self.loading.device))
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error

    def save(self, directory: Path, merge_adapter: bool = False) -> None:
        """Model (with LoRA: the adapter, or the merged model) and tokenizer, loadable by `from_pretrained`."""
        model = self.model.merge_and_unload() if merge_adapter else self.model
        model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)


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
