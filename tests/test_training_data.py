"""Reading preference files: TRL's formats, and what is said of a file that has something else in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from infopo_kernels.training.data import read_preferences
from infopo_kernels.training.errors import UserError
from infopo_kernels.commands.demo.word_problems import word_problems


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


GOOD = {"prompt": "Q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        (GOOD, "Q", "a", "b"),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "The sky is", " blue.", " green."),
        (
            {"prompt": [user("Q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
            [user("Q")],
            [assistant("a")],
            [assistant("b")],
        ),
        (
            {"chosen": [user("Q"), assistant("a")], "rejected": [user("Q"), assistant("b")]},
            [user("Q")],
            [assistant("a")],
            [assistant("b")],
        ),
    ],
    ids=["standard", "standard-implicit", "conversational", "conversational-implicit"],
)
def test_formats(tmp_path: Path, row: Any, prompt: Any, chosen: Any, rejected: Any) -> None:
    (pair,) = read_preferences(write(tmp_path / "pairs.jsonl", row))
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, chosen, rejected)
    assert pair.conversational == isinstance(prompt, list)


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": "One two three", "rejected": "One two four"},
        {"chosen": [user("Q"), assistant("a")], "rejected": [user("Q"), assistant("b")]},
    ],
)
def test_implicit_prompts_are_those_that_trl_finds(tmp_path: Path, row: Any) -> None:
    trl = pytest.importorskip("trl")
    (pair,) = read_preferences(write(tmp_path / "pairs.jsonl", row))
    expected = trl.extract_prompt(row)
    assert {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} == expected


def test_template_arguments_blank_lines_and_byte_order_mark(tmp_path: Path) -> None:
    row = {**GOOD, "tools": json.dumps([{"name": "t"}]), "chat_template_kwargs": {"thinking": False}, "score": 3}
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\n  \n" + json.dumps(row).encode() + b"\n")
    plain, rich = read_preferences(path)
    assert plain.template == {}
    assert rich.template == {"tools": [{"name": "t"}], "thinking": False}
    assert rich.where == f"{path}, line 4"


def test_the_demo_writes_what_is_read(tmp_path: Path) -> None:
    rows = [pair.row() for pair in word_problems(20)]
    pairs = read_preferences(write(tmp_path / "pairs.jsonl", *rows))
    assert [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs] == rows


A, B, Q = [assistant("a")], [assistant("b")], [user("Q")]
BAD = [
    ("not-json", "{'prompt': 'Q'}", "line 2: is not JSON", "one JSON object a line"),
    ("not-an-object", ["Q", "a", "b"], "line 2: expected a JSON object, got a list of 3", "write"),
    ("no-chosen", {"prompt": "Q", "rejected": "b"}, "field `chosen`: is missing", "found: `prompt`, `rejected`"),
    ("null-rejected", {**GOOD, "rejected": None}, "field `rejected`: is missing", "each line needs"),
    ("empty-object", {}, "field `chosen`: is missing", "the object is empty"),
    ("number", {**GOOD, "chosen": 3}, "field `chosen`: expected a string or a list of messages, got 3", "got"),
    ("boolean", {**GOOD, "chosen": True}, "field `chosen`", "got true"),
    ("empty-string", {**GOOD, "rejected": ""}, "field `rejected`: is empty", "leave the line out"),
    ("empty-list", {"prompt": Q, "chosen": [], "rejected": B}, "field `chosen`: is an empty list", "at least one"),
    ("equal", {**GOOD, "rejected": "a"}, "field `rejected`: equals `chosen`", "no preference"),
    ("mixed", {"prompt": Q, "chosen": A, "rejected": "b"}, "field `rejected`: is the string 'b'", "one format"),
    (
        "string-prompt",
        {"prompt": "Q", "chosen": A, "rejected": B},
        "field `prompt`: is the string 'Q'",
        "leave `prompt`",
    ),
    ("list-prompt", {"prompt": Q, "chosen": "a", "rejected": "b"}, "field `prompt`: is a list of 1", "all three"),
    ("message", {"prompt": Q, "chosen": ["a"], "rejected": B}, "field `chosen[0]`: expected a message", "role"),
    ("no-role", {"prompt": Q, "chosen": [{"content": "a"}], "rejected": B}, "field `chosen[0].role`", "got nothing"),
    ("no-content", {"prompt": Q, "chosen": [{"role": "assistant"}], "rejected": B}, "`chosen[0].content`", "a string"),
    (
        "parts",
        {"prompt": Q, "chosen": [{"role": "assistant", "content": [{"type": "text"}]}], "rejected": B},
        "field `chosen[0].content`: is a list of parts",
        "one string",
    ),
    ("image", {**GOOD, "images": ["x.png"]}, "field `images`: holds images", "only text"),
    ("ends-with-assistant", {"prompt": Q + A, "chosen": A, "rejected": B}, "field `prompt`: ends with", "user's turn"),
    ("repeats", {"prompt": Q, "chosen": Q + A, "rejected": Q + B}, "field `chosen`: repeats the prompt", "leave"),
    ("user-reply", {"prompt": Q, "chosen": [user("x")], "rejected": B}, "field `chosen[0].role`", "got 'user'"),
    ("nothing-shared", {"chosen": "a", "rejected": "b"}, "field `prompt`: is missing", "add `prompt`"),
    ("beginning", {"chosen": "abc", "rejected": "ab"}, "field `rejected`: is the beginning of the other", "add"),
    ("tools-text", {**GOOD, "tools": "not json"}, "field `tools`: is a string but not JSON", "column 1"),
    ("tools-type", {**GOOD, "tools": {"a": 1}}, "field `tools`: expected a list of tools", "an object"),
    (
        "kwargs",
        {**GOOD, "chat_template_kwargs": [1]},
        "field `chat_template_kwargs`: expected an object",
        "a list of 1",
    ),
]


@pytest.mark.parametrize(("row", "what", "remedy"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_bad_line_is_named_with_its_field_and_a_remedy(tmp_path: Path, row: Any, what: str, remedy: str) -> None:
    path = write(tmp_path / "pairs.jsonl", GOOD, row, GOOD)
    with pytest.raises(UserError) as caught:
        read_preferences(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 2")
    assert what in message
    assert remedy in message
    assert "\n" not in message


def test_other_bad_lines_are_counted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 1, field `chosen`.* \(2 more with problems: line 3, 4\)$"):
        read_preferences(write(tmp_path / "pairs.jsonl", {}, GOOD, "oops", {"chosen": "x"}))


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match="line 2: byte 12 is not UTF-8"):
        read_preferences(path)


@pytest.mark.parametrize("kind", ["missing", "directory", "empty"])
def test_files_that_hold_nothing(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "pairs.jsonl"
    if kind == "directory":
        path.mkdir()
    elif kind == "empty":
        path.write_text("\n\n")
    expected = {"missing": "no such file", "directory": "is a directory", "empty": "holds no pair"}[kind]
    with pytest.raises(UserError, match=expected) as caught:
        read_preferences(path)
    assert str(path) in str(caught.value)
