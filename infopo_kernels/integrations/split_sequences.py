"""Trainers under Accelerate's context parallelism (`cp_size`) and Ulysses (`sp_size`): each rank holds a part of every
sequence.

Attention makes up for the cut by itself: torch's ring attention, or DeepSpeed's exchange of heads for tokens. The loss
needs the sum over all parts, which `sequence_group` forms. What differs between the two ways, and is settled here:

                    context parallelism                       Ulysses
    cuts            two slices from both ends of a sequence   one slice
    who cuts        Trainer, around a step                    DeepSpeed's loader, which wants tensors [S, T] only
    batches         one for all parts                         one for each rank; the ranks work on them in turn
    gradients       averaged over all ranks                   ZeRO-1 and -2 add up those of the parts and average over
                                                              the rest; ZeRO-3 averages over all ranks
    evaluation      in parts                                  whole sequences: DeepSpeed leaves modules in evaluation
                                                              mode alone
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from infopo_kernels.integrations.collators import PreferenceCollator
from infopo_kernels.integrations.sealed import Sealed
from infopo_kernels.integrations.transformers import causal_model

_WAYS = {"cp": "context parallelism (`cp_size`)", "sp": "Ulysses (`sp_size`)"}


@dataclass(frozen=True)
class SplitSequences:
    """How Accelerate cuts the sequences of a trainer.

    Args:
        way: "cp" for context parallelism, "sp" for Ulysses.
        parts: ranks that hold one sequence between them.
        averaged: whether the engine averages the gradients of the parts instead of adding them up.
    """

    way: Literal["cp", "sp"]
    parts: int
    averaged: bool

    @classmethod
    def of(cls, accelerator: Any) -> SplitSequences | None:
        """What `ParallelismConfig` asks for; None if it leaves sequences whole.

        Raises:
            ValueError: Ulysses with ZeRO-3 and `reduce_scatter` off.
        """
        config = getattr(accelerator, "parallelism_config", None)
        for way in ("cp", "sp"):
            parts = getattr(config, f"{way}_size", None) or 1
            if parts > 1:
                averaged = way == "cp" or _averages_parts(accelerator.state.deepspeed_plugin.deepspeed_config)
                return cls(way, parts, averaged)  # type: ignore[arg-type]
        return None

    @property
    def multiple(self) -> int:
        """What the length of a batch must be a multiple of: ring attention cuts each sequence into 2 slices a rank."""
        return 2 * self.parts if self.way == "cp" else self.parts

    def check(self, name: str, collator: Any, args: Any, *, dropout: bool) -> None:
        """Refuse what would train another loss, or end in an error of another library in the middle of a run.

        Raises:
            ValueError: the collator is not a `PreferenceCollator` with a `pad_to_multiple_of` that fits; with Ulysses,
                also dropout that stays on, and incomplete batches.
        """
        way = _WAYS[self.way]
        if not isinstance(collator, PreferenceCollator):
            raise ValueError(
                f"{name} under {way} takes padded batches of PreferenceCollator, got {type(collator).__name__}: both "
                f"ways drop attention masks, without which packed sequences would see one another. Leave "
                f"`padding_free` and `data_collator` out."
            )
        multiple = collator.pad_to_multiple_of or 1
        if multiple % self.multiple:
            raise ValueError(
                f"`pad_to_multiple_of` must be a multiple of {self.multiple} under {way} with {self.parts} parts, got "
                f"{collator.pad_to_multiple_of}; pass pad_to_multiple_of={self.multiple}, so that every sequence can "
                f"be cut."
            )
        if self.way == "sp" and dropout:
            raise ValueError(
                f"{name} under {way} needs disable_dropout=True: DeepSpeed joins the parts in training mode only, so "
                f"the reference has to run in training mode too."
            )
        if self.way == "sp" and not args.dataloader_drop_last:
            raise ValueError(
                f"{name} under {way} needs dataloader_drop_last=True: DeepSpeed's loader does not say which pairs of "
                f"an incomplete batch were repeated to fill it."
            )

    def groups(self, accelerator: Any, model: Any) -> dict[str, Any]:
        """`sequence_group` and `data_group` of the forward of a prepared model."""
        if self.way == "sp":
            from deepspeed.utils import groups  # installed where Ulysses runs, and slow to import

            _take_any_batch(causal_model(model).config._attn_implementation)
            group = groups._get_sequence_parallel_group()
            return {"sequence_group": group, **({"data_group": group} if self.averaged else {})}
        mesh = accelerator.torch_device_mesh
        return {"sequence_group": mesh["cp"].get_group(), "data_group": mesh["dp_cp"].get_group()}


def _averages_parts(config: dict[str, Any]) -> bool:
    """Whether DeepSpeed averages over the parts of a sequence, as it does in ZeRO-3 (seen with deepspeed 0.19)."""
    zero = config.get("zero_optimization", {})
    if zero.get("stage") != 3:
        return False
    if zero.get("reduce_scatter", True) is False:
        raise ValueError(
            "`reduce_scatter: false` of ZeRO-3 does not go with Ulysses (`sp_size`): DeepSpeed then adds up the "
            "gradients of some buckets over the parts of a sequence, and averages those of others. Leave it out."
        )
    return True


def _take_any_batch(implementation: str) -> None:
    """Let DeepSpeed's attention take as many sequences as come.

    It was made for batches of `per_device_train_batch_size` sequences. A batch of so many pairs holds twice as many, or
    more where prompts have several rejected responses.

    Raises:
        RuntimeError: DeepSpeed has not put its attention in place, or keeps it elsewhere.
    """
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF  # slow to import

    closure = getattr(ALL_ATTENTION_FUNCTIONS[implementation], "__closure__", None) or ()
    found = [cell.cell_contents for cell in closure if isinstance(cell.cell_contents, UlyssesSPAttentionHF)]
    if not found:
        raise RuntimeError(
            f"DeepSpeed's attention was not found behind attn_implementation={implementation!r}; sequences would be "
            f"taken for whole. This was tested with deepspeed 0.19."
        )
    if not found[0]._forward_pre_hooks:
        found[0].register_forward_pre_hook(_fit_batch)


def _fit_batch(attention: Any, args: tuple[Any, ...]) -> None:
    attention.batch_size = args[1].shape[0]
    for name in ("required_query_shape", "required_key_value_shape", "required_context_shape"):
        length, _, *rest = getattr(attention, name)
        setattr(attention, name, torch.Size([length, attention.batch_size, *rest]))


class UlyssesCollator:
    """A collator's batch as DeepSpeed's loader takes it: tensors [S, T] with positions, everything else sealed.

    The loader cuts every tensor along its second dimension, and sends anything else from rank to rank as it is.
    """

    def __init__(self, collator: PreferenceCollator) -> None:
        self.collator = collator

    def __call__(self, features: Any) -> dict[str, Any]:
        """One batch."""
        batch = self.collator(features)
        shape = batch["input_ids"].shape
        batch["position_ids"] = torch.arange(shape[1]).expand(shape).contiguous()
        return {
            key: Sealed(value) if isinstance(value, Tensor) and value.shape != shape else value
            for key, value in batch.items()
        }


def opened(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch without the seals of `UlyssesCollator`."""
    return {key: value.value if isinstance(value, Sealed) else value for key, value in batch.items()}
