"""The limits of a model: the largest token id and the longest sequence that it can take.

Beyond them a model raises an IndexError after some steps, or on a GPU a device-side assertion that names nothing. So we
compare both with the data before any work.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from infopo_kernels.integrations.preference_rows import PreferenceError


@dataclass(frozen=True)
class ModelLimits:
    """Upper limits of token ids and of lengths."""

    vocabulary: int | None
    """Ids are below this; None if it is not known."""
    positions: int | None
    """Tokens in a sequence; None where positions are computed (rotary, ALiBi, none) and have no table to run out of."""


def model_limits(model: Any) -> ModelLimits:
    """The limits of a model, or of the model that a configuration describes (made without its weights).

    Args:
        model: a causal language model of transformers, with an adapter or without, or its configuration.
    """
    if not isinstance(model, nn.Module):
        config = model
        model = _without_weights(config)
        if model is None:
            text = config.get_text_config() if hasattr(config, "get_text_config") else config
            return ModelLimits(getattr(text, "vocab_size", None), None)
    embedding = model.get_input_embeddings()
    vocabulary = _rows(getattr(embedding, "weight", None))
    head = model.get_output_embeddings()
    if (classes := _rows(getattr(head, "weight", None))) is not None:
        vocabulary = classes if vocabulary is None else min(vocabulary, classes)
    return ModelLimits(vocabulary, _learned_positions(model, embedding))


def _without_weights(config: Any) -> Any:
    """The model on the meta device; None where it cannot be made so (code that comes with the model)."""
    # Imported here: a model needs no second import, and the package can be used without transformers.
    factory = importlib.import_module("transformers").AutoModelForCausalLM
    try:
        with torch.device("meta"):
            return factory.from_config(config)
    except Exception:  # other people's code, on a device that it was not written for
        return None


def _rows(weight: Any) -> int | None:
    """Rows of a weight, also of one that ZeRO-3 has partitioned (which then has none)."""
    shape: Any = getattr(weight, "ds_shape", None) or getattr(weight, "shape", ())
    return int(shape[0]) if len(shape) == 2 else None


def _learned_positions(model: nn.Module, embedding: Any) -> int | None:
    """Positions of the smallest table of them in the model.

    Tables are embeddings, and buffers that hold as many rows as the configuration names positions (GPT-J, CTRL). XGLM's
    table grows by itself; it is neither.
    """
    config: Any = getattr(model, "config", None)
    named = getattr(config, "max_position_embeddings", None)
    # MPT makes its ALiBi slopes for so many tokens, and fails beyond.
    limits: list[int] = [config.max_seq_len] if getattr(config, "model_type", None) == "mpt" else []
    for name, module in model.named_modules():
        own = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and module is not embedding and _names_positions(own):
            # OPT and BART keep rows in front of the first position (`offset`), RoBERTa those up to the padding's.
            unused = getattr(module, "offset", 0) or (0 if module.padding_idx is None else module.padding_idx + 1)
            limits.append(int(_rows(module.weight) or module.num_embeddings) - int(unused))
        for key, value in (*module.named_buffers(recurse=False), *vars(module).items()):
            if (
                isinstance(value, torch.Tensor)
                and value.is_floating_point()
                and value.ndim == 2
                and len(value) == named
                and _names_positions(key)
            ):
                limits.append(len(value))
    return min(limits, default=None)


def _names_positions(name: str) -> bool:
    return "pos" in name or name == "wpe"


def check_features(
    features: Iterable[dict[str, Any]],
    model: Any,
    places: Sequence[str] | None = None,
    max_length: int | None = None,
) -> None:
    """Compare the largest token id and the longest pair with what the model can take, before any work.

    Args:
        features: as they will be trained on, see `infopo_kernels.integrations.preferences`; a list or a dataset.
        model: the model, or its configuration (see `model_limits`).
        places: where each feature came from, for messages; default: "pair 0", "pair 1", ...
        max_length: where a collator will cut them; None if they are cut already, or never.

    Raises:
        PreferenceError: a pair goes beyond; names the first one, its size, the limit, and what to do.
    """
    limits = model_limits(model)
    if hasattr(features, "with_format") and _table_fits(features, limits, max_length):
        return
    for index, feature in enumerate(features):
        _check_feature(feature, limits, places[index] if places else f"pair {index}", max_length)


def _table_fits(dataset: Any, limits: ModelLimits, max_length: int | None) -> bool:
    """Whether all rows of a `datasets.Dataset` fit: read by columns, a hundred times faster than by rows."""
    # Imported here: whoever has a dataset has it, and others need not.
    compute = importlib.import_module("pyarrow.compute")
    largest = smallest = longest = 0
    for table in dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).with_format("arrow").iter(10_000):
        prompt, chosen, rejected = (table[name].combine_chunks() for name in table.column_names)
        nested = rejected.type.value_type != prompt.type.value_type
        pairs = compute.list_parent_indices(rejected) if nested else None
        flat = compute.list_flatten(rejected) if nested else rejected
        for responses, owners in ((chosen, None), (flat, pairs)):
            lengths = compute.list_value_length(prompt)
            lengths = lengths if owners is None else lengths.take(owners)
            total = compute.max(compute.add(lengths, compute.list_value_length(responses))).as_py()
            longest = max(longest, total or 0)
        for ids in (prompt, chosen, flat):
            ends = compute.min_max(compute.list_flatten(ids)).as_py()
            smallest, largest = min(smallest, ends["min"] or 0), max(largest, ends["max"] or 0)
    if max_length is not None:
        longest = min(longest, max_length)
    fits = smallest >= 0 and (limits.vocabulary is None or largest < limits.vocabulary)
    return fits and (limits.positions is None or longest <= limits.positions)


def _check_feature(feature: dict[str, Any], limits: ModelLimits, where: str, max_length: int | None) -> None:
    prompt, rejected = list(feature["prompt_ids"])[:max_length], feature["rejected_ids"]
    nested = bool(rejected) and isinstance(rejected[0], Sequence)
    responses = {"chosen": feature["chosen_ids"]}
    responses |= {f"rejected[{k}]": ids for k, ids in enumerate(rejected)} if nested else {"rejected": rejected}
    for name, ids in {"prompt": [], **responses}.items():
        sequence = [*prompt, *ids][:max_length]
        smallest, largest = min(sequence, default=0), max(sequence, default=0)
        if smallest < 0:
            raise PreferenceError(
                f"holds the token id {smallest}; ids are from 0 up. What is not to be scored is said in `chosen_mask` "
                f"and `rejected_mask` (0), and padding is the collator's.",
                where=where,
                field=name,
            )
        if limits.vocabulary is not None and largest >= limits.vocabulary:
            raise PreferenceError(
                f"holds the token id {largest}, and the model has embeddings for ids below {limits.vocabulary}; "
                f"use the tokenizer that belongs to the model, or give the model rows for added tokens: "
                f"model.resize_token_embeddings(len(tokenizer)).",
                where=where,
                field=name,
            )
        if limits.positions is not None and len(sequence) > limits.positions:
            what = "the prompt has" if name == "prompt" else "prompt and response have"
            raise PreferenceError(
                f"{what} {len(sequence)} tokens, and the model has learned positions for {limits.positions}; cut the "
                f"data with max_length={limits.positions} (or less), or use a model with longer context.",
                where=where,
                field=name,
            )
