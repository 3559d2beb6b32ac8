"""Preference batches, padded and packed, from tokenised pairs.

A feature is a pair in the names of TRL: ``prompt_ids``, ``chosen_ids``, ``rejected_ids``, lists of token ids; and, if
known, ``ref_chosen_logps`` and ``ref_rejected_logps``. In every batch all chosen sequences come before all rejected
ones, and what it holds goes straight into the forward of a model with `attach_linear_logps`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infopo_kernels.options import IGNORE_INDEX
from infopo_kernels.training.data import parse_preference
from infopo_kernels.training.tokens import tokenize

Feature = dict[str, Any]


def preference_features(tokenizer: Any, rows: Iterable[dict[str, Any]], max_length: int | None = None) -> list[Feature]:
    """Tokenised pairs of rows in TRL's preference format (`prompt`, `chosen`, `rejected`: strings or conversations).

    Tokenised as TRL's `DPOTrainer` does; responses are cut to `max_length` tokens of prompt and response, and pairs of
    which nothing to compare is left are dropped.

    Raises:
        infopo_kernels.training.errors.UserError: a row is wrong; names the field.
    """
    pairs = [parse_preference(row, f"row {index}") for index, row in enumerate(rows)]
    return [
        {"prompt_ids": example.prompt, "chosen_ids": example.chosen, "rejected_ids": example.rejected}
        for example in tokenize(tokenizer, pairs, max_length).examples
    ]


@dataclass(frozen=True)
class _Sequence:
    prompt: list[int]
    response: list[int]

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.response

    @property
    def labels(self) -> list[int]:
        return [IGNORE_INDEX] * len(self.prompt) + self.response


def _cut(prompt: list[int], response: list[int], max_length: int | None) -> _Sequence:
    """The first `max_length` tokens."""
    if max_length is None:
        return _Sequence(prompt, response)
    return _Sequence(prompt[:max_length], response[: max(0, max_length - len(prompt))])


def _ref_logps(features: Sequence[Feature]) -> dict[str, Tensor]:
    """[2B] float64 if the features hold references; NaN for those that are missing (a skipped chosen half)."""
    names = ("ref_chosen_logps", "ref_rejected_logps")
    if not any(name in feature for feature in features for name in names):
        return {}
    values = [feature.get(name) for name in names for feature in features]
    return {"ref_logps": torch.tensor([torch.nan if v is None else float(v) for v in values], dtype=torch.float64)}


def _positions(lengths: Iterable[int]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])


def _bounds(lengths: Iterable[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@dataclass
class _Collator:
    max_length: int | None = None
    """Sequences are cut at the end to this many tokens; None never cuts."""

    def _halves(self, features: Sequence[Feature]) -> tuple[list[_Sequence], list[_Sequence]]:
        chosen, rejected = (
            [_cut(list(f["prompt_ids"]), list(f[half]), self.max_length) for f in features]
            for half in ("chosen_ids", "rejected_ids")
        )
        for half, sequences in (("chosen", chosen), ("rejected", rejected)):
            for index, sequence in enumerate(sequences):
                if len(sequence.response) < (1 if sequence.prompt else 2):
                    raise ValueError(
                        f"The {half} response of pair {index} of the batch has no token to score"
                        + (f" within max_length = {self.max_length}" if self.max_length is not None else "")
                        + "; drop the pair or raise the maximum length."
                    )
        return chosen, rejected


@dataclass
class PreferenceCollator(_Collator):
    """Padded batches: `input_ids`, `attention_mask`, `labels` [2B, T], and `ref_logps` [2B] where known.

    Args:
        max_length: sequences are cut at the end to this many tokens.
        pad_token_id: what padding is filled with; its value has no influence.
        pad_to_multiple_of: T is rounded up to a multiple of this.
    """

    pad_token_id: int = 0
    pad_to_multiple_of: int | None = None

    def __call__(self, features: Sequence[Feature]) -> dict[str, Tensor]:
        """One batch, chosen first."""
        chosen, rejected = self._halves(features)
        sequences = chosen + rejected
        step = self.pad_to_multiple_of or 1
        T = -(-max(len(s.tokens) for s in sequences) // step) * step

        def padded(rows: list[list[int]], value: int) -> Tensor:
            return torch.tensor([row + [value] * (T - len(row)) for row in rows])

        return {
            "input_ids": padded([s.tokens for s in sequences], self.pad_token_id),
            "attention_mask": padded([[1] * len(s.tokens) for s in sequences], 0),
            "labels": padded([s.labels for s in sequences], IGNORE_INDEX),
            **_ref_logps(features),
        }


@dataclass
class PackedPreferenceCollator(_Collator):
    """Batches without padding: all sequences in one row.

    `input_ids`, `position_ids`, `labels` [1, N]; `cu_seqlens` [2B + 1] int32; `is_chosen` [2B]; `ref_logps` [2B] where
    known. There is no attention mask: transformers tells the sequences apart by their positions, under
    "flash_attention_2" (which then runs its variable-length kernel), "sdpa", "flex_attention" and "eager" alike. Models
    with state-space or linear-attention layers would mix the sequences: use `PreferenceCollator` for those.

    Args:
        max_length: sequences are cut at the end to this many tokens.
        flash_attention_kwargs: also give `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q`, `max_length_k`, which save
            flash-attn the search for the bounds in every layer.
        share_prompt: chosen and rejected response of a pair share one copy of their prompt in the row. The batch then
            holds a mask [1, 1, N, N] (N² bytes) and `rows`; needs "sdpa" and layers that all attend without a window.
    """

    flash_attention_kwargs: bool = False
    share_prompt: bool = False

    def __post_init__(self) -> None:
        if self.flash_attention_kwargs and self.share_prompt:
            raise ValueError("`share_prompt` needs a mask, which flash-attn does not take; choose one of them.")

    def __call__(self, features: Sequence[Feature]) -> dict[str, Any]:
        """One batch, chosen first."""
        chosen, rejected = self._halves(features)
        sequences = chosen + rejected
        is_chosen = torch.arange(len(sequences)) < len(chosen)
        if self.share_prompt:
            return {**_shared_prompts(chosen, rejected), "is_chosen": is_chosen, **_ref_logps(features)}
        lengths = [len(s.tokens) for s in sequences]
        cu_seqlens = _bounds(lengths)
        batch: dict[str, Any] = {
            "input_ids": torch.tensor([[t for s in sequences for t in s.tokens]]),
            "position_ids": _positions(lengths)[None],
            "labels": torch.tensor([[t for s in sequences for t in s.labels]]),
            "cu_seqlens": cu_seqlens,
            "is_chosen": is_chosen,
            **_ref_logps(features),
        }
        if self.flash_attention_kwargs:
            batch |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
            batch |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        return batch


def _shared_prompts(chosen: list[_Sequence], rejected: list[_Sequence]) -> dict[str, Tensor]:
    """Row [prompt | chosen | rejected] of each pair; a response sees its prompt and itself.

    The last token of the prompt predicts the first of both responses, so a row may be scored twice: `rows` [M] says on
    which row each of `labels` [M] is scored.
    """
    ids: list[int] = []
    positions, part, pair = [], [], []  # part: 0 prompt, 1 chosen, 2 rejected
    rows: dict[int, list[list[int]]] = {1: [], 2: []}
    for index, (w, r) in enumerate(zip(chosen, rejected, strict=True)):
        start = len(ids)
        ids += w.prompt + w.response + r.response
        positions += [torch.arange(len(w.prompt))]
        part += [torch.zeros(len(w.prompt), dtype=torch.int64)]
        first = start + len(w.prompt)
        for number, response in ((1, w.response), (2, r.response)):
            positions += [torch.arange(len(w.prompt), len(w.prompt) + len(response))]
            part += [torch.full((len(response),), number)]
            # Without a prompt nothing predicts the first token.
            before = [start + len(w.prompt) - 1] if w.prompt else []
            rows[number].append(before + list(range(first, first + len(response) - 1)))
            first += len(response)
        pair += [torch.full((len(ids) - start,), index)]
    parts, pairs, order = torch.cat(part), torch.cat(pair), torch.arange(len(ids))
    same = pairs[:, None] == pairs
    visible = (parts == 0) | (parts[:, None] == parts)
    scored = rows[1] + rows[2]
    labels = [s.response if s.prompt else s.response[1:] for s in chosen + rejected]
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.cat(positions)[None],
        "attention_mask": (same & visible & (order[:, None] >= order))[None, None],
        "labels": torch.tensor([t for tokens in labels for t in tokens]),
        "rows": torch.tensor([row for each in scored for row in each]),
        "cu_seqlens": _bounds(len(each) for each in scored),
    }
