"""Preference data in TRL's formats, read and checked line by line before anything heavy is loaded.

A file holds one JSON object a line, of one of

    {"prompt": str, "chosen": str, "rejected": str}                               standard
    {"prompt": [message], "chosen": [message], "rejected": [message]}             conversational
    {"chosen": ..., "rejected": ...}                                              prompt implicit: what both begin with

with message = {"role": str, "content": str}. `tools` (a list, or its JSON) and `chat_template_kwargs` go to the chat
template; other fields are left alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from infopo_kernels.training.errors import UserError

Message: TypeAlias = dict[str, Any]
Text: TypeAlias = "str | list[Message]"

_RESPONSES: Final = ("chosen", "rejected")
_VISION: Final = ("image", "images")


@dataclass(frozen=True)
class Preference:
    """One pair: strings throughout, or conversations throughout."""

    prompt: Text
    chosen: Text
    rejected: Text
    template: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template: `tools` and whatever `chat_template_kwargs` held."""
    where: str = ""
    """Where it came from, for messages: "pairs.jsonl, line 3"."""

    @property
    def conversational(self) -> bool:
        """Whether a chat template has to render it."""
        return isinstance(self.prompt, list)


class _Problem(Exception):
    """What is wrong with a row: field, and the rest of the sentence."""

    def __init__(self, name: str | None, text: str) -> None:
        super().__init__(text)
        self.name = name


def read_preferences(path: str | Path) -> list[Preference]:
    """All pairs of a JSONL file.

    Raises:
        UserError: the file cannot be read, or a line is wrong; names file, line and field, says what was expected and
            what to do, and lists the other lines with problems.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; pass the path of a JSONL file of preference pairs.") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory; pass the JSONL file inside it.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from None
    pairs: list[Preference] = []
    problems: list[tuple[int, str]] = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            pairs.append(parse_preference(_json_object(line), where))
        except _Problem as problem:
            name = f", field `{problem.name}`" if problem.name else ""
            problems.append((number, f"{where}{name}: {problem}"))
    if problems:
        others = [str(number) for number, _ in problems[1:]]
        shown = ", ".join(others[:10]) + (", ..." if len(others) > 10 else "")
        more = f" ({len(others)} more with problems: line {shown})" if others else ""
        raise UserError(problems[0][1] + more)
    if not pairs:
        raise UserError(f"{path}: holds no pair; write one JSON object with `prompt`, `chosen`, `rejected` a line.")
    return pairs


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _Problem(None, f"byte {error.start} is not UTF-8; save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        raise _Problem(
            None,
            f"is not JSON ({error.msg} at column {error.colno}); write one JSON object a line, without line breaks.",
        ) from None
    if not isinstance(row, dict):
        raise _Problem(None, f"expected a JSON object, got {_kind(row)}; write {{'prompt': ..., 'chosen': ..., ...}}.")
    return row


def parse_preference(row: dict[str, Any], where: str = "") -> Preference:
    """One row in any of the formats, checked, its prompt made explicit."""
    for name in _VISION:
        if row.get(name):
            raise _Problem(name, "holds images; only text is trained on here. Leave the field out.")
    for name in _RESPONSES:
        if row.get(name) is None:
            raise _Problem(name, f"is missing; each line needs `chosen` and `rejected`{_found(row)}.")
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    for name, value in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if value is not None:
            _check_text(name, value)
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise _Problem("rejected", f"is {_kind(rejected)} but `chosen` is {_kind(chosen)}; give both in one format.")
    if prompt is not None and isinstance(prompt, list) != isinstance(chosen, list):
        remedy = (
            "leave `prompt` out if the conversations begin with it"
            if isinstance(chosen, list)
            else "give all three as strings or all three as conversations"
        )
        raise _Problem("prompt", f"is {_kind(prompt)} but `chosen` is {_kind(chosen)}; {remedy}.")
    if chosen == rejected:
        raise _Problem("rejected", "equals `chosen`; there is no preference in such a pair, leave it out.")
    if prompt is None:
        prompt, chosen, rejected = _split_prompt(chosen, rejected)
    elif isinstance(prompt, list):
        _check_turns(prompt, chosen, rejected)
    return Preference(prompt, chosen, rejected, _template_arguments(row), where)


def _check_text(name: str, value: Any) -> None:
    if isinstance(value, str):
        if not value:
            raise _Problem(name, "is empty; write the text, or leave the line out.")
        return
    if not isinstance(value, list):
        raise _Problem(name, f"expected a string or a list of messages, got {_kind(value)}.")
    if not value:
        raise _Problem(name, "is an empty list; give at least one message.")
    for index, message in enumerate(value):
        at = f"{name}[{index}]"
        if not isinstance(message, dict):
            raise _Problem(at, f"expected a message {{'role': ..., 'content': ...}}, got {_kind(message)}.")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise _Problem(f"{at}.role", f"expected 'system', 'user' or 'assistant', got {_kind(role)}.")
        if content is None and message.get("tool_calls"):
            continue
        if isinstance(content, list):
            raise _Problem(f"{at}.content", "is a list of parts; only text is trained on here: give it as one string.")
        if not isinstance(content, str):
            raise _Problem(f"{at}.content", f"expected a string, got {_kind(content)}.")


def _check_turns(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> None:
    if prompt[-1]["role"] == "assistant":
        raise _Problem("prompt", "ends with the assistant; end it with the user's turn and put the reply in `chosen`.")
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if response[: len(prompt)] == prompt:
            raise _Problem(name, "repeats the prompt; leave `prompt` out, or these messages of the response.")
        if response[0]["role"] != "assistant":
            raise _Problem(f"{name}[0].role", f"expected 'assistant' after the prompt, got {response[0]['role']!r}.")


def _split_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """The longest common beginning is the prompt; a space at its end belongs to the responses, as in TRL."""
    shared = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        shared += 1
    if isinstance(chosen, str) and shared and chosen[shared - 1] == " ":
        shared -= 1
    if not shared:
        raise _Problem("prompt", "is missing, and `chosen` and `rejected` do not begin alike; add `prompt`.")
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if len(response) == shared:
            raise _Problem(
                name, "is the beginning of the other response, which leaves it nothing to score; add `prompt`."
            )
    if isinstance(chosen, list):
        _check_turns(chosen[:shared], chosen[shared:], rejected[shared:])
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _template_arguments(row: dict[str, Any]) -> dict[str, Any]:
    arguments = row.get("chat_template_kwargs") or {}
    if not isinstance(arguments, dict):
        raise _Problem("chat_template_kwargs", f"expected an object of arguments, got {_kind(arguments)}.")
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise _Problem("tools", f"is a string but not JSON ({error.msg} at column {error.colno}).") from None
    if tools is not None and not isinstance(tools, list):
        raise _Problem("tools", f"expected a list of tools, or its JSON, got {_kind(tools)}.")
    return {"tools": tools, **arguments} if tools else dict(arguments)


def _kind(value: Any) -> str:
    """A value in words that say what it is, short enough for one line."""
    if value is None:
        return "nothing"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    return f"{'the string ' if isinstance(value, str) else ''}{text if len(text) <= 40 else text[:37] + '...'}"


def _found(row: dict[str, Any]) -> str:
    return f" (found: {', '.join(f'`{key}`' for key in row)})" if row else " (the object is empty)"
