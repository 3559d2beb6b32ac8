"""Features of `infopo_kernels.integrations.preferences` with one rejected response, as objects."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from infopo_kernels.integrations import preferences
from infopo_kernels.integrations.preferences import Feature, Preference, PreferenceError


@dataclass(frozen=True)
class Example:
    """Token ids of a pair; the responses are what is scored."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class Tokenized:
    """Examples, and what became of the rest."""

    examples: list[Example]
    truncated: int
    """Pairs of which a response was cut at `max_length`."""
    dropped: int
    """Pairs left out because the cut leaves no response, or two equal ones."""


def _example(feature: Feature) -> Example:
    return Example(feature["prompt_ids"], feature["chosen_ids"], feature["rejected_ids"])


def encode(tokenizer: Any, pair: Preference) -> Example:
    """See `preferences.encode`."""
    return _example(preferences.encode(tokenizer, pair))


def cut(example: Example, max_length: int) -> Example:
    """See `preferences.cut`."""
    room = max(0, max_length - len(example.prompt))
    return Example(example.prompt, example.chosen[:room], example.rejected[:room])


def tokenize(tokenizer: Any, pairs: Iterable[Preference], max_length: int | None) -> Tokenized:
    """All pairs, cut at the end to `max_length` tokens (None: never).

    Raises:
        PreferenceError: nothing is left to train on; or see `preferences.encode`.
    """
    whole = [preferences.encode(tokenizer, pair) for pair in pairs]
    kept = [preferences.cut(feature, max_length) for feature in whole]
    examples = [_example(feature) for feature in kept if preferences.scorable(feature)]
    if not examples:
        raise PreferenceError(f"no pair has two different responses to score within --max-length {max_length}.")
    truncated = sum(a != b for a, b in zip(kept, whole, strict=True) if preferences.scorable(a))
    return Tokenized(examples, truncated, len(whole) - len(examples))
