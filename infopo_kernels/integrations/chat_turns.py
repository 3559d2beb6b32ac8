"""Where turns begin and end in a conversation that a chat template renders.

Templates are programs, and we know only what they render. So we render the beginning of a conversation alone, and look
how far the whole conversation begins with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from infopo_kernels.integrations.preference_rows import Message, Preference, PreferenceError

SCORE_TURNS: Final = ("all", "assistant")
"""all: every token after the prompt, as TRL's `DPOTrainer`; assistant: what the assistant says in a response of several
turns, without user and tool turns and without the headers that the template puts before a turn."""

_MARK: Final = "qzMARKzq"
"""Stands for a turn's content, to find where that begins."""


def common_prefix(*sequences: Sequence[Any]) -> int:
    """Length of the common beginning."""
    length = 0
    for items in zip(*sequences, strict=False):
        if any(item != items[0] for item in items):
            break
        length += 1
    return length


class Renderer:
    """A tokenizer's (or processor's) chat template with the arguments of one row."""

    def __init__(self, tokenizer: Any, pair: Preference) -> None:
        """Raises PreferenceError if there is no chat template."""
        self._tokenizer = tokenizer
        self._pair = pair
        self._processor = hasattr(tokenizer, "tokenizer")  # takes contents in parts, and gives a batch of one
        if not getattr(tokenizer, "chat_template", None):
            raise PreferenceError(
                "is a conversation, but the model's tokenizer has no chat template; give `prompt`, `chosen` and "
                "`rejected` as strings, or use a model that was tuned for chat.",
                where=pair.where,
            )

    def ids(self, turns: list[Message], *, reply: bool = False) -> list[int]:
        """Token ids; with `reply` up to where the assistant's reply begins."""
        ids = self._render(turns, reply, tokenize=True, return_dict=True)["input_ids"]
        return list(ids[0] if self._processor else ids)

    def text(self, turns: list[Message], *, reply: bool = False) -> str:
        """The same as text."""
        return str(self._render(turns, reply, tokenize=False))

    def _render(self, turns: list[Message], reply: bool, **kwargs: Any) -> Any:
        if self._processor:
            turns = [_in_parts(turn) for turn in turns]
        if reply:
            kwargs["add_generation_prompt"] = True
        try:
            return self._tokenizer.apply_chat_template(turns, **kwargs, **self._pair.template)
        except Exception as error:  # templates are other people's programs and may raise anything
            raise PreferenceError(
                f"the model's chat template refuses this conversation: {error}", where=self._pair.where
            ) from error


def _in_parts(turn: Message) -> Message:
    content = turn.get("content")
    return {**turn, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else turn


def check_prompt_is_kept(render: Renderer, pair: Preference, wholes: Sequence[list[Message]]) -> None:
    """Refuse a pair whose last prompt turn is rendered differently in the prompt alone and in the conversations.

    Everything after the common beginning is scored as the response. If the common beginning ended inside the last turn
    of the prompt, part of the prompt would be scored, and in this loss the chosen and the rejected copy do not cancel.

    Raises:
        PreferenceError: the renderings part before the end of that turn.
    """
    assert isinstance(pair.prompt, list)
    last = pair.prompt[-1]
    content = last.get("content")
    if not isinstance(content, str) or not content.strip():
        return
    alone = render.text(pair.prompt, reply=True)
    marked = render.text([*pair.prompt[:-1], {**last, "content": _MARK}], reply=True)
    begin = marked.lower().rfind(_MARK.lower())
    if begin < 0:  # the template does not show the content: we cannot look for it
        return
    kept = common_prefix(alone, *(render.text(turns) for turns in wholes))
    if kept < begin + len(content.strip()):
        raise PreferenceError(
            f"the model's chat template renders the prompt alone otherwise than at the beginning of the conversation: "
            f"they part before the end of the last turn of the prompt (after {alone[:kept][-40:]!r}), so that part of "
            f"the prompt would be scored as the response. Use a template that renders each turn without looking at "
            f"those after it, or give responses of one turn.",
            where=pair.where,
            field="prompt",
        )


def scored_mask(
    render: Renderer, pair: Preference, name: str, response: list[Message], whole: list[int], start: int, score: str
) -> list[int]:
    """For the tokens of a response, `whole[start:]`: 1 if the turn is scored, 0 if not.

    A turn with weight 0 is not scored, from the end of the turn before it to its own end. With `score="assistant"` only
    the assistant's turns are scored, without the header that the template puts before them.

    Raises:
        PreferenceError: the template renders the first turns alone otherwise than inside the conversation.
    """
    assert isinstance(pair.prompt, list)
    mask: list[int] = []
    end = start
    for index, turn in enumerate(response):
        begin, before = end, [*pair.prompt, *response[:index]]
        scored = turn.get("weight") != 0
        if index + 1 == len(response):
            end = len(whole)
        else:
            end = _turn_end(render, [*before, turn], [*pair.prompt, *response], whole)
        if score == "assistant":
            scored = scored and turn["role"] == "assistant"
            if scored and index:
                begin = max(begin, common_prefix(render.ids(before, reply=True), whole))
        if not start + len(mask) <= begin < end:
            raise PreferenceError(
                f"the model's chat template renders the turns up to `{name}[{index}]` alone otherwise than inside the "
                f"conversation (it may leave out the thinking of earlier turns), so that which tokens are this turn "
                f"cannot be told. Put the earlier turns into the prompt, or score all turns.",
                where=pair.where,
                field=f"{name}[{index}]",
            )
        mask += [0] * (begin - start - len(mask)) + [int(scored)] * (end - begin)
    return mask


def _turn_end(render: Renderer, turns: list[Message], conversation: list[Message], whole: list[int]) -> int:
    """Where, in the tokens of the conversation, its first `turns` end; -1 if it does not begin with them."""
    ids = render.ids(turns)
    shared = common_prefix(ids, whole)
    if shared < len(ids) and not render.text(conversation).startswith(render.text(turns).rstrip()):
        return -1
    return shared
