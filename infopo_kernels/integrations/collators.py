"""Preference batches, padded and packed, from the features of `infopo_kernels.integrations.preferences`.

In every batch all chosen sequences come first, then all rejected ones (those of a prompt side by side, in their order).
A model with `attach_linear_logps` takes the batch as it is. Beside the keys of the layout it holds:

    ref_logps           [S] float64, nats, where features hold references; NaN for a chosen one that was skipped
    is_chosen           [S] bool; always in packs, in padded batches with the three below
    sequence_weights    [S] float64: w of the pair for its chosen sequence, w / K for each of its K rejected ones
    num_pairs           float: prompts in the batch
    num_rejected        list of int: K of each prompt
    rejected_start      int, in packs without shared prompts: the token with which the rejected sequences begin

Those from `sequence_weights` to `num_rejected` are there if a feature lists several rejected responses or has a weight.
Then the loss is the sum over the sequences of weight times term, over `num_pairs`. The last two spare the host reading
the others from the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infopo_kernels.integrations.preferences import (
    Feature,
    cut,
    lists_rejected,
    nothing_to_score,
    preference_features,
    rejected_responses,
)
from infopo_kernels.options import IGNORE_INDEX

__all__ = ["Feature", "PackedPreferenceCollator", "PreferenceCollator", "pad_token_id", "preference_features"]


def pad_token_id(processor: Any) -> int:
    """What to pad with: the padding token of a tokenizer (or of a processor's), else its end token, else 0."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return next((id for id in (tokenizer.pad_token_id, tokenizer.eos_token_id) if id is not None), 0)


@dataclass(frozen=True)
class _Sequence:
    prompt: list[int]
    response: list[int]
    mask: list[int]
    """Of the response: 1 = scored."""

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.response

    @property
    def labels(self) -> list[int]:
        return [IGNORE_INDEX] * len(self.prompt) + self.targets

    @property
    def targets(self) -> list[int]:
        return [token if scored else IGNORE_INDEX for token, scored in zip(self.response, self.mask, strict=True)]


@dataclass(frozen=True)
class _Prompt:
    """A prompt's sequences, its weight and its references."""

    chosen: _Sequence
    rejected: list[_Sequence]
    weight: float
    ref_chosen: float
    ref_rejected: list[float]


def _prompt(feature: Feature) -> _Prompt:
    prompt = list(feature["prompt_ids"])
    responses = [list(feature["chosen_ids"]), *map(list, rejected_responses(feature))]
    K = len(responses) - 1
    masks: list[Any] = [feature.get("chosen_mask")]
    masks += [None] * K if feature.get("rejected_mask") is None else rejected_responses(feature, "rejected_mask")
    missing = [None] * K
    references = (
        missing if feature.get("ref_rejected_logps") is None else rejected_responses(feature, "ref_rejected_logps")
    )
    chosen, *rejected = [
        _Sequence(prompt, ids, [1] * len(ids) if mask is None else list(mask))
        for ids, mask in zip(responses, masks, strict=True)
    ]
    weight = feature.get("weight")
    ref_chosen, *ref_rejected = [torch.nan if value is None else float(value) for value in
                                 (feature.get("ref_chosen_logps"), *references)]  # fmt: skip
    return _Prompt(chosen, rejected, 1.0 if weight is None else float(weight), ref_chosen, ref_rejected)


def _loss_keys(features: Sequence[Feature], prompts: Sequence[_Prompt], *, packed: bool) -> dict[str, Any]:
    """The keys for the loss beside the layout (see the head of this file)."""
    keys: dict[str, Any] = {}
    K = [len(p.rejected) for p in prompts]
    several = any(feature.get("weight") is not None or lists_rejected(feature) for feature in features)
    if packed or several:
        keys["is_chosen"] = torch.arange(len(prompts) + sum(K)) < len(prompts)
    if several:
        weights = [p.weight for p in prompts] + [
            p.weight / k for p, k in zip(prompts, K, strict=True) for _ in range(k)
        ]
        keys["sequence_weights"] = torch.tensor(weights, dtype=torch.float64)
        keys["num_pairs"] = float(len(prompts))
        keys["num_rejected"] = K
    if any(name in feature for feature in features for name in ("ref_chosen_logps", "ref_rejected_logps")):
        values = [p.ref_chosen for p in prompts] + [value for p in prompts for value in p.ref_rejected]
        keys["ref_logps"] = torch.tensor(values, dtype=torch.float64)
    return keys


def _positions(lengths: Iterable[int]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])


def _bounds(lengths: Iterable[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def _length(value: Any) -> int | None:
    """None for what has no length, as a number or a tensor of one."""
    try:
        return len(value)
    except TypeError:
        return None


def _plain(value: Any) -> Any:
    """Lists and numbers for what a table in the format "torch" or "numpy" holds."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(each) if hasattr(each, "tolist") else each for each in value] if isinstance(value, list) else value


def _check(feature: Feature, index: int) -> None:
    """Refuse what features of other hands may hold: masks and references that do not fit, weights that are none."""
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        if feature.get(name) is None:
            raise ValueError(
                f"Pair {index} of the batch has no `{name}` (found: {', '.join(feature)}); make features of rows with "
                f"preference_features(tokenizer, rows), or feature_dataset for a table."
            )
    several, responses = lists_rejected(feature), rejected_responses(feature)
    weight = feature.get("weight")
    if weight is not None and not 0 < weight < float("inf"):
        raise ValueError(f"`weight` of pair {index} of the batch must be a finite number above 0, got {weight}.")
    for name, ids in (("chosen", [feature["chosen_ids"]]), ("rejected", responses)):
        mask = feature.get(f"{name}_mask")
        if mask is None:
            continue
        listed = list(mask) if several and name == "rejected" else [mask]
        sizes = list(map(_length, listed))
        if sizes != [len(each) for each in ids]:
            raise ValueError(
                f"`{name}_mask` of pair {index} of the batch must be as long as `{name}_ids` (lengths "
                f"{[len(each) for each in ids]}), got {sizes}."
            )
    references = feature.get("ref_rejected_logps")
    if references is not None and _length(references) != (len(responses) if several else None):
        expected = f"a list of {len(responses)}, one for each rejected response" if several else "one number"
        raise ValueError(f"`ref_rejected_logps` of pair {index} of the batch must be {expected}, got {references!r}.")


@dataclass
class _Collator:
    max_length: int | None = None
    """Responses are cut where this many tokens of prompt and response end; None never cuts."""

    def _prompts(self, features: Sequence[Feature]) -> tuple[list[Feature], list[_Prompt]]:
        features = [{name: _plain(value) for name, value in feature.items()} for feature in features]
        for index, feature in enumerate(features):
            _check(feature, index)
        kept = [cut(feature, self.max_length) for feature in features]
        for index, feature in enumerate(kept):
            if (name := nothing_to_score(feature)) is not None:
                raise ValueError(
                    f"{name[0].upper()}{name[1:]} of pair {index} of the batch has no token to score"
                    + (f" within max_length = {self.max_length}" if self.max_length is not None else "")
                    + "; drop the pair or raise the maximum length."
                )
        return kept, [_prompt(feature) for feature in kept]


@dataclass
class PreferenceCollator(_Collator):
    """Padded batches: `input_ids`, `attention_mask`, `labels` [S, T], chosen first; S is 2B for B pairs.

    `labels` are the input ids, `IGNORE_INDEX` where a token is not scored, not shifted. Further keys: see the module.

    Args:
        max_length: responses are cut where this many tokens of prompt and response end.
        pad_token_id: what padding is filled with; its value has no influence.
        pad_to_multiple_of: T is rounded up to a multiple of this.

    Raises:
        ValueError: a response has no token to score.
    """

    pad_token_id: int = 0
    pad_to_multiple_of: int | None = None

    def __call__(self, features: Sequence[Feature]) -> dict[str, Any]:
        """One batch, chosen first."""
        features, prompts = self._prompts(features)
        sequences = [p.chosen for p in prompts] + [each for p in prompts for each in p.rejected]
        step = self.pad_to_multiple_of or 1
        T = -(-max(len(s.tokens) for s in sequences) // step) * step

        def padded(rows: list[list[int]], value: int) -> Tensor:
            return torch.tensor([row + [value] * (T - len(row)) for row in rows])

        return {
            "input_ids": padded([s.tokens for s in sequences], self.pad_token_id),
            "attention_mask": padded([[1] * len(s.tokens) for s in sequences], 0),
            "labels": padded([s.labels for s in sequences], IGNORE_INDEX),
            **_loss_keys(features, prompts, packed=False),
        }


@dataclass
class PackedPreferenceCollator(_Collator):
    """Batches without padding: all sequences in one row.

    `input_ids`, `position_ids`, `labels` [1, N]; `cu_seqlens` [S + 1] int32; `is_chosen` [S]; `rejected_start`. Further
    keys: see the module. There is no attention mask: transformers tells the sequences apart by their positions, under
    "flash_attention_2" (which then runs its variable-length kernel), "sdpa", "flex_attention" and "eager" alike. Models
    with state-space or linear-attention layers would mix the sequences: use `PreferenceCollator` for those.

    Args:
        max_length: responses are cut where this many tokens of prompt and response end.
        flash_attention_kwargs: also give `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q`, `max_length_k`, which save
            flash-attn the search for the bounds in every layer.
        share_prompt: all responses of a prompt share one copy of it in the row. The batch then holds a mask
            [1, 1, N, N] (N² bytes) and `rows`; needs "sdpa" and layers that all attend without a window.

    Raises:
        ValueError: a response has no token to score; options that contradict each other.
    """

    flash_attention_kwargs: bool = False
    share_prompt: bool = False

    def __post_init__(self) -> None:
        if self.flash_attention_kwargs and self.share_prompt:
            raise ValueError("`share_prompt` needs a mask, which flash-attn does not take; choose one of them.")

    def __call__(self, features: Sequence[Feature]) -> dict[str, Any]:
        """One batch, chosen first."""
        features, prompts = self._prompts(features)
        keys = _loss_keys(features, prompts, packed=True)
        if self.share_prompt:
            return {**_shared_prompts(prompts), **keys}
        sequences = [p.chosen for p in prompts] + [each for p in prompts for each in p.rejected]
        lengths = [len(s.tokens) for s in sequences]
        cu_seqlens = _bounds(lengths)
        batch: dict[str, Any] = {
            "input_ids": torch.tensor([[t for s in sequences for t in s.tokens]]),
            "position_ids": _positions(lengths)[None],
            "labels": torch.tensor([[t for s in sequences for t in s.labels]]),
            "cu_seqlens": cu_seqlens,
            "rejected_start": sum(lengths[: len(prompts)]),
            **keys,
        }
        if self.flash_attention_kwargs:
            batch |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
            batch |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        return batch


def _shared_prompts(prompts: Sequence[_Prompt]) -> dict[str, Tensor]:
    """Row [prompt | chosen | rejected | rejected | ...] of each prompt; a response sees its prompt and itself.

    The last token of the prompt predicts the first of every response, so a row may be scored several times: `rows` [M]
    says on which row each of `labels` [M] is scored. Tokens that are not scored have no entry.
    """
    ids: list[int] = []
    positions, part, owner = [], [], []  # part: 0 for the prompt, k for its k-th response
    chosen: list[tuple[list[int], list[int]]] = []  # rows and labels of a sequence
    rejected: list[tuple[list[int], list[int]]] = []
    for index, prompt in enumerate(prompts):
        tokens = prompt.chosen.prompt
        start = len(ids)
        ids += tokens
        positions.append(torch.arange(len(tokens)))
        part.append(torch.zeros(len(tokens), dtype=torch.int64))
        for number, sequence in enumerate([prompt.chosen, *prompt.rejected], start=1):
            length = len(sequence.response)
            first = len(ids)
            ids += sequence.response
            positions.append(torch.arange(len(tokens), len(tokens) + length))
            part.append(torch.full((length,), number))
            # Token k is predicted by the row before it: the first by the prompt's last, without a prompt by none.
            before = [start + len(tokens) - 1 if tokens else -1, *range(first, first + length - 1)]
            scored = [k for k in range(length) if sequence.mask[k] and before[k] >= 0]
            entry = [before[k] for k in scored], [sequence.response[k] for k in scored]
            (chosen if number == 1 else rejected).append(entry)
        owner.append(torch.full((len(ids) - start,), index))
    parts, owners, order = torch.cat(part), torch.cat(owner), torch.arange(len(ids))
    same = owners[:, None] == owners
    visible = (parts == 0) | (parts[:, None] == parts)
    entries = chosen + rejected
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.cat(positions)[None],
        "attention_mask": (same & visible & (order[:, None] >= order))[None, None],
        "labels": torch.tensor([label for _, labels in entries for label in labels]),
        "rows": torch.tensor([row for rows, _ in entries for row in rows]),
        "cu_seqlens": _bounds(len(rows) for rows, _ in entries),
    }
