"""Rows of preference data: TRL's formats, read and checked line by line before anything heavy is loaded.

A row (a line of a JSONL file, a row of a dataset) is one of

    {"prompt": str, "chosen": str, "rejected": str}                               standard
    {"prompt": [message], "chosen": [message], "rejected": [message]}             conversational
    {"chosen": ..., "rejected": ...}                                              prompt implicit: what all begin with

with message = {"role": str, "content": str}. Further fields that are read:

    rejected                a list of responses (of strings, or of conversations): several rejected ones for the prompt
    weight                  number above 0: weight of the pair in the loss, 1 where it is missing
    message["weight"]       0: this turn of a response is not scored
    tools                   a list, or its JSON; goes to the chat template
    chat_template_kwargs    goes to the chat template
    ref_chosen_logps, ref_rejected_logps    reference log-probabilities, nats; one or a list for `rejected`

Other fields are left alone.
"""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

Message: TypeAlias = dict[str, Any]
Text: TypeAlias = "str | list[Message]"

_VISION: Final = ("image", "images")
_BINARY: Final = (
    (b"\x1f\x8b", "is compressed with gzip; unpack it with gunzip."),
    (b"BZh", "is compressed with bzip2; unpack it with bunzip2."),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd; unpack it with unzstd."),
    (b"PK\x03\x04", "is a zip archive; unpack it."),
    (b"PAR1", "is a Parquet file; write it as JSONL with datasets.Dataset.from_parquet(FILE).to_json(OTHER)."),
)
"""First bytes of files that are not text, and what to do."""

_SHOWN: Final = 5
"""Bad rows that a report shows with their reasons."""


class PreferenceError(ValueError):
    """A preference row, or a file of them, that cannot be used; the message says where, what and what to do."""

    def __init__(self, reason: str, *, where: str = "", field: str | None = None) -> None:
        at = ", ".join(part for part in (where, f"field `{field}`" if field else "") if part)
        super().__init__(f"{at}: {reason}" if at else reason)
        self.reason = reason
        self.where = where
        """The row: "pairs.jsonl, line 3", "row 2"; empty if there is no single one."""
        self.field = field
        """The field of the row, e.g. `rejected[1][0].content`; None if the whole row is meant."""


class PreferenceWarning(UserWarning):
    """Something was left out of preference data, or the data is not what it seems; training goes on."""


@dataclass(frozen=True)
class Preference:
    """One prompt, its chosen and its rejected responses: strings throughout, or conversations throughout."""

    prompt: Text
    chosen: Text
    rejected: Text | list[Text]
    """One response, or a list of several (see `several`)."""
    template: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template: `tools` and whatever `chat_template_kwargs` held."""
    where: str = ""
    """Where it came from, for messages: "pairs.jsonl, line 3"."""
    weight: float | None = None
    """Weight of the pair in the loss; None where the row has none, which counts as 1."""
    references: dict[str, Any] = field(default_factory=dict)
    """`ref_chosen_logps` and `ref_rejected_logps` as far as the row holds them, nats."""

    @property
    def conversational(self) -> bool:
        """Whether a chat template has to render it."""
        return isinstance(self.prompt, list)

    @property
    def several(self) -> bool:
        """Whether `rejected` is a list of responses (one or more)."""
        return isinstance(self.rejected, list) and (not self.conversational or isinstance(self.rejected[0], list))

    @property
    def rejected_responses(self) -> list[Any]:
        """The rejected responses, one or more, each in the format of `chosen`."""
        return list(self.rejected) if self.several else [self.rejected]


def read_preferences(path: str | Path, skip_bad_rows: bool = False) -> list[Preference]:
    """All pairs of a JSONL file, in its order.

    Args:
        path: the file, UTF-8, one JSON object a line; blank lines are skipped.
        skip_bad_rows: leave out lines that cannot be used, with one `PreferenceWarning`: how many, the first ones, and
            why. By default one bad line refuses the file.

    Raises:
        PreferenceError: the file cannot be read, holds no usable line, or (by default) one that is wrong; names file,
            line and field, says what was expected and what to do, and lists the other lines with problems.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        reason = "no such file; pass the path of a JSONL file of preference pairs."
        raise PreferenceError(reason, where=str(path)) from None
    except IsADirectoryError:
        raise PreferenceError("is a directory; pass the JSONL file inside it.", where=str(path)) from None
    except OSError as error:
        raise PreferenceError(f"cannot be read: {error.strerror}.", where=str(path)) from None
    other = _other_format(content, path)
    if other is not None:
        raise PreferenceError(other, where=str(path))
    pairs: list[Preference] = []
    problems: list[PreferenceError] = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            pairs.append(parse_preference(_json_object(line, where), where))
        except PreferenceError as problem:
            problems.append(problem)
    report_bad_rows(problems, len(pairs) + len(problems), skip=skip_bad_rows)
    if not pairs:
        raise PreferenceError(
            "holds no pair; write one JSON object with `prompt`, `chosen`, `rejected` a line.", where=str(path)
        )
    return pairs


def _other_format(content: bytes, path: Path) -> str | None:
    """What a file is that is not JSONL, and what to do; None if it may be JSONL."""
    for start, reason in _BINARY:
        if content.startswith(start):
            return reason
    begin = content.removeprefix(b"\xef\xbb\xbf").lstrip()
    header = begin.split(b"\n", 1)[0].strip().replace(b'"', b"").replace(b"\t", b",").split(b",")
    if path.suffix in (".csv", ".tsv") or {b"chosen", b"rejected"} <= set(header):
        return "is a table of separated values; write it as JSONL with datasets.Dataset.from_csv(FILE).to_json(OTHER)."
    if begin.startswith(b"[") and begin.rstrip().endswith(b"]"):
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(json.loads(begin), list):
                return (
                    "is one JSON array; write one JSON object a line, with "
                    "datasets.Dataset.from_json(FILE).to_json(OTHER)."
                )
    return None


def report_bad_rows(problems: Sequence[PreferenceError], rows: int, *, skip: bool) -> None:
    """Refuse the data if some of its `rows` rows are wrong; with `skip`, warn: how many, the first ones, and why.

    Raises:
        PreferenceError: there is a problem and not `skip`, or no row is left.
    """
    if not problems:
        return
    first = problems[0]
    if skip and len(problems) < rows:
        lines = [f"{len(problems)} of {rows} rows cannot be used and are left out:", *map(str, problems[:_SHOWN])]
        if len(problems) > _SHOWN:
            lines.append(f"... and {len(problems) - _SHOWN} more")
        warnings.warn("\n  ".join(lines), PreferenceWarning, stacklevel=3)
        return
    others = [problem.where.split()[-1] for problem in problems[1:] if problem.where]
    shown = ", ".join(others[:10]) + (", ..." if len(others) > 10 else "")
    unit = first.where.split()[-2] if others else ""
    more = f" ({len(others)} more with problems: {unit} {shown}; `skip_bad_rows` leaves them out)" if others else ""
    raise PreferenceError(first.reason + more, where=first.where, field=first.field) from None


def _json_object(line: bytes, where: str) -> dict[str, Any]:
    if b"\x00" in line:
        raise PreferenceError(
            "holds NUL bytes; save the file as UTF-8 (it looks like UTF-16 or is damaged).", where=where
        )
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise PreferenceError(f"byte {error.start} is not UTF-8; save the file as UTF-8.", where=where) from None
    except (ValueError, RecursionError) as error:  # a JSONDecodeError, a number too long, brackets too deep
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise PreferenceError(
            f"is not JSON ({reason}); write one JSON object a line, without line breaks.", where=where
        ) from None
    if not isinstance(row, dict):
        raise PreferenceError(
            f"expected a JSON object, got {_kind(row)}; write {{'prompt': ..., 'chosen': ..., ...}}.", where=where
        )
    return row


def parse_preference(row: dict[str, Any], where: str = "") -> Preference:
    """One row in any of the formats, checked, its prompt made explicit.

    Args:
        row: the fields; those that are None count as missing.
        where: what messages call the row, e.g. "row 3".

    Raises:
        PreferenceError: names row and field.
    """
    try:
        return _parse(row, where)
    except PreferenceError as error:
        raise PreferenceError(error.reason, where=where, field=error.field) from None


def _parse(row: dict[str, Any], where: str) -> Preference:
    for name in _VISION:
        if row.get(name):
            raise _problem(name, "holds images; only text is trained on here. Leave the field out.")
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise _problem(name, f"is missing; each line needs `chosen` and `rejected`{_found(row)}.")
    prompt, chosen, rejected = row.get("prompt"), _clean("chosen", row["chosen"]), row["rejected"]
    if prompt is not None:
        prompt = _clean("prompt", prompt)
    if several := _is_several(rejected):
        responses = {f"rejected[{index}]": _clean(f"rejected[{index}]", each) for index, each in enumerate(rejected)}
    else:
        responses = {"rejected": _clean("rejected", rejected)}
    for name, response in responses.items():
        if isinstance(chosen, list) != isinstance(response, list):
            raise _problem(name, f"is {_kind(response)} but `chosen` is {_kind(chosen)}; give both in one format.")
    if prompt is not None and isinstance(prompt, list) != isinstance(chosen, list):
        remedy = (
            "leave `prompt` out if the conversations begin with it"
            if isinstance(chosen, list)
            else "give all three as strings or all three as conversations"
        )
        raise _problem("prompt", f"is {_kind(prompt)} but `chosen` is {_kind(chosen)}; {remedy}.")
    for name, response in responses.items():
        if chosen == response:
            raise _problem(name, "equals `chosen`; there is no preference in such a pair, leave it out.")
    if prompt is None:
        shared = _shared_beginning([chosen, *responses.values()])
        prompt, chosen = chosen[:shared], chosen[shared:]
        responses = {name: response[shared:] for name, response in responses.items()}
    if isinstance(prompt, list):
        _check_turns(prompt, {"chosen": chosen, **responses})
    return Preference(
        prompt,
        chosen,
        list(responses.values()) if several else responses["rejected"],
        _template_arguments(row),
        where,
        _pair_weight(row),
        _references(row, len(responses) if several else None),
    )


def _problem(name: str, text: str) -> PreferenceError:
    return PreferenceError(text, field=name)


def _is_several(rejected: Any) -> bool:
    """Whether `rejected` is a list of responses rather than one: of strings or lists, not of messages."""
    if not isinstance(rejected, list) or any(isinstance(each, dict) for each in rejected):
        return False
    return any(isinstance(each, (str, list)) for each in rejected)


def _clean(name: str, value: Any) -> Any:
    """A text as it is used: checked, and messages without the fields that a table fills with None."""
    if isinstance(value, str):
        if not value:
            raise _problem(name, "is empty; write the text, or leave the line out.")
        _check_characters(name, value)
        return value
    if not isinstance(value, list):
        raise _problem(name, f"expected a string or a list of messages, got {_kind(value)}.")
    if not value:
        raise _problem(name, "is an empty list; give at least one message.")
    return [_clean_message(f"{name}[{index}]", message) for index, message in enumerate(value)]


def _clean_message(at: str, message: Any) -> Message:
    if not isinstance(message, dict):
        raise _problem(at, f"expected a message {{'role': ..., 'content': ...}}, got {_kind(message)}.")
    role, content, weight = message.get("role"), message.get("content"), message.get("weight")
    if not isinstance(role, str) or not role:
        raise _problem(f"{at}.role", f"expected 'system', 'user' or 'assistant', got {_kind(role)}.")
    if isinstance(content, list):
        raise _problem(f"{at}.content", "is a list of parts; only text is trained on here: give it as one string.")
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise _problem(f"{at}.content", f"expected a string, got {_kind(content)}.")
    if weight is not None and weight not in (0, 1):
        raise _problem(f"{at}.weight", f"expected 0 (this turn is not scored) or 1, got {_kind(weight)}.")
    _check_characters(at, message)
    return {key: value for key, value in message.items() if value is not None or key == "content"}


def _check_characters(name: str, value: Any) -> None:
    """Refuse text that no tokenizer takes: halves of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(value[error.start])
            raise _problem(
                name,
                f"holds half of a character at position {error.start} (the lone surrogate \\u{code:04x}), which cannot "
                f"be tokenised; write the whole character, or leave it out.",
            ) from None
    elif isinstance(value, dict):
        for key, each in value.items():
            _check_characters(f"{name}.{key}", each)
    elif isinstance(value, list):
        for index, each in enumerate(value):
            _check_characters(f"{name}[{index}]", each)


def _check_turns(prompt: list[Message], responses: dict[str, list[Message]]) -> None:
    if prompt[-1]["role"] == "assistant":
        raise _problem("prompt", "ends with the assistant; end it with the user's turn and put the reply in `chosen`.")
    for name, response in responses.items():
        if response[: len(prompt)] == prompt:
            raise _problem(name, "repeats the prompt; leave `prompt` out, or these messages of the response.")
        if response[0]["role"] != "assistant":
            raise _problem(f"{name}[0].role", f"expected 'assistant' after the prompt, got {response[0]['role']!r}.")


def _shared_beginning(responses: Sequence[Any]) -> int:
    """Length of the longest common beginning, which is the prompt; a space at its end belongs to the responses.

    Where one response is the beginning of the others, its last character or turn stays in the responses. Both rules are
    those of TRL's `extract_prompt`.
    """
    shortest = min(map(len, responses))
    shared = next(
        (index for index in range(shortest) if any(each[index] != responses[0][index] for each in responses)), shortest
    )
    contained = shared == shortest
    if contained or (isinstance(responses[0], str) and shared and responses[0][shared - 1] == " "):
        shared -= 1
    if not shared and isinstance(responses[0], list) and contained:
        raise _problem(
            "prompt",
            "is missing, and a response that is one message begins the others; add `prompt`, which they share.",
        )
    if not shared and not contained:
        raise _problem("prompt", "is missing, and `chosen` and `rejected` do not begin alike; add `prompt`.")
    return shared


def _template_arguments(row: dict[str, Any]) -> dict[str, Any]:
    arguments = row.get("chat_template_kwargs") or {}
    if not isinstance(arguments, dict):
        raise _problem("chat_template_kwargs", f"expected an object of arguments, got {_kind(arguments)}.")
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise _problem("tools", f"is a string but not JSON ({error.msg} at column {error.colno}).") from None
    if tools is not None and not isinstance(tools, list):
        raise _problem("tools", f"expected a list of tools, or its JSON, got {_kind(tools)}.")
    _check_characters("tools", tools)
    _check_characters("chat_template_kwargs", arguments)
    return {"tools": tools, **arguments} if tools else dict(arguments)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _pair_weight(row: dict[str, Any]) -> float | None:
    weight = row.get("weight")
    if weight is None:
        return None
    if not _is_number(weight) or weight <= 0:
        raise _problem("weight", f"expected a finite number above 0, got {_kind(weight)}; leave such a pair out.")
    return float(weight)


def _references(row: dict[str, Any], several: int | None) -> dict[str, Any]:
    """`several`: how many rejected responses the row lists; None where `rejected` is a single one."""
    chosen, rejected = row.get("ref_chosen_logps"), row.get("ref_rejected_logps")
    found: dict[str, Any] = {}
    if chosen is not None:
        if not _is_number(chosen):
            raise _problem("ref_chosen_logps", f"expected a finite number (nats), got {_kind(chosen)}.")
        found["ref_chosen_logps"] = float(chosen)
    if rejected is not None:
        listed = rejected if isinstance(rejected, list) else [rejected]
        expected = "a finite number (nats)" if several is None else f"a list of {several} finite numbers (nats)"
        if (
            isinstance(rejected, list) != (several is not None)
            or len(listed) != (several or 1)
            or not all(map(_is_number, listed))
        ):
            raise _problem("ref_rejected_logps", f"expected {expected}, got {_kind(rejected)}.")
        found["ref_rejected_logps"] = list(map(float, listed)) if several is not None else float(rejected)
    return found


def _kind(value: Any) -> str:
    """A value in words, short enough for one line."""
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
