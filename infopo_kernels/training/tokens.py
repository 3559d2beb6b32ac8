"""From pairs of text to token ids: the chat template, where the response begins, and the length limit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from infopo_kernels.training.data import Preference
from infopo_kernels.training.errors import UserError


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


def _common_prefix(*sequences: list[int]) -> int:
    length = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length


def encode(tokenizer: Any, pair: Preference) -> Example:
    """Token ids of one pair, tokenised as TRL's `DPOTrainer` does.

    Prompt and response are tokenised together; the response begins where the prompt's own tokens end, or earlier where
    tokens merge across the boundary. Standard responses get an end-of-sequence token.

    Raises:
        UserError: a conversation, but the tokenizer has no chat template, or the template refuses it.
    """
    if pair.conversational:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"{pair.where}: is a conversation, but the model's tokenizer has no chat template; give `prompt`, "
                f"`chosen` and `rejected` as strings, or use a model that was tuned for chat."
            )
        try:
            prompt, chosen, rejected = (
                list(tokenizer.apply_chat_template(turns, return_dict=True, **kwargs, **pair.template)["input_ids"])
                for turns, kwargs in (
                    (pair.prompt, {"add_generation_prompt": True}),
                    (pair.prompt + pair.chosen, {}),  # type: ignore[operator]
                    (pair.prompt + pair.rejected, {}),  # type: ignore[operator]
                )
            )
        except Exception as error:  # templates are programs of others and raise what they like
            raise UserError(f"{pair.where}: the model's chat template refuses this conversation: {error}") from error
    else:
        end = tokenizer.eos_token or ""
        responses = [r if r.endswith(end) else r + end for r in (str(pair.chosen), str(pair.rejected))]
        prompt, chosen, rejected = (
            list(tokenizer(text)["input_ids"]) for text in (pair.prompt, *(str(pair.prompt) + r for r in responses))
        )
    start = min(_common_prefix(prompt, chosen), _common_prefix(prompt, rejected))
    return Example(prompt[:start], chosen[start:], rejected[start:])


def cut(example: Example, max_length: int) -> Example:
    """The pair with its responses cut where `max_length` tokens end."""
    room = max(0, max_length - len(example.prompt))
    return Example(example.prompt, example.chosen[:room], example.rejected[:room])


def tokenize(tokenizer: Any, pairs: Iterable[Preference], max_length: int | None) -> Tokenized:
    """All pairs, cut at the end to `max_length` tokens (None: never).

    Raises:
        UserError: nothing is left to train on; or see `encode`.
    """
    examples: list[Example] = []
    truncated = dropped = longest = 0
    for pair in pairs:
        example = encode(tokenizer, pair)
        length = len(example.prompt) + max(len(example.chosen), len(example.rejected))
        longest = max(longest, length)
        kept = example if max_length is None else cut(example, max_length)
        # A first token has no logits to be scored by: without a prompt one token of a response says nothing.
        scored = min(len(kept.chosen), len(kept.rejected)) - (not kept.prompt)
        if scored < 1 or kept.chosen == kept.rejected:
            dropped += 1
            continue
        truncated += kept != example
        examples.append(kept)
    if not examples:
        limit = (
            "" if max_length is None else f" within --max-length {max_length} (the longest pair has {longest} tokens)"
        )
        raise UserError(f"no pair has two different responses to score{limit}; raise the limit or shorten the prompts.")
    return Tokenized(examples, truncated, dropped)
