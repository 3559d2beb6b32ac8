"""Reading preference files: TRL's formats, and what is said of a file that has something else in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from infopo_kernels.integrations.preferences import (
    Preference,
    PreferenceError,
    PreferenceWarning,
    check_features,
    cut,
    encode,
    feature_dataset,
    nothing_to_score,
    parse_preference,
    preference_features,
    read_preferences,
    scorable,
)
from infopo_kernels.commands.demo.word_problems import word_problems

from .training_fixtures import byte_tokenizer, save_tiny_model, tiny_model


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
    ("beginning", {"chosen": Q + A, "rejected": Q}, "field `prompt`: is missing", "add `prompt`"),
    (
        "weight",
        {**GOOD, "weight": 0},
        "field `weight`: expected a finite number above 0, got 0",
        "leave such a pair out",
    ),
    ("weight-nan", {**GOOD, "weight": float("nan")}, "field `weight`: expected a finite number above 0", "got nan"),
    ("weight-text", {**GOOD, "weight": "2"}, "field `weight`", "the string '2'"),
    (
        "turn-weight",
        {"prompt": Q, "chosen": [{**assistant("a"), "weight": 0.5}], "rejected": B},
        "`chosen[0].weight`",
        "0.5",
    ),
    ("several-empty", {**GOOD, "rejected": ["b", ""]}, "field `rejected[1]`: is empty", "leave the line out"),
    ("several-equal", {**GOOD, "rejected": ["b", "a"]}, "field `rejected[1]`: equals `chosen`", "no preference"),
    ("several-mixed", {**GOOD, "rejected": ["b", B]}, "field `rejected[1]`: is a list of 1", "one format"),
    ("several-role", {"prompt": Q, "chosen": A, "rejected": [B, [user("x")]]}, "field `rejected[1][0].role`", "'user'"),
    (
        "references",
        {**GOOD, "rejected": ["b", "c"], "ref_rejected_logps": [-1.0]},
        "`ref_rejected_logps`",
        "a list of 2",
    ),
    (
        "surrogate",
        '{"prompt": "Q", "chosen": "a\\ud83d", "rejected": "b"}',
        "field `chosen`: holds half of a character",
        "d83d",
    ),
    (
        "surrogate-message",
        {"prompt": Q, "chosen": A, "rejected": [assistant("\udc00b")]},
        "field `rejected[0].content`: holds half of a character at position 0",
        "leave it out",
    ),
    (
        "surrogate-tools",
        {**GOOD, "tools": [{"name": "\ud800"}]},
        "field `tools[0].name`: holds half",
        "cannot be tokenised",
    ),
    ("nul-bytes", "\x00{}", "line 2: holds NUL bytes", "UTF-8"),
    ("long-number", '{"prompt": ' + "9" * 5000 + "}", "line 2: is not JSON", "one JSON object a line"),
    ("deep", "[" * 100_000, "line 2: is not JSON", "one JSON object a line"),
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
    with pytest.raises(PreferenceError) as caught:
        read_preferences(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 2")
    assert what in message
    assert remedy in message
    assert "\n" not in message


def test_other_bad_lines_are_counted(tmp_path: Path) -> None:
    with pytest.raises(
        PreferenceError, match=r"line 1, field `chosen`.* \(2 more with problems: line 3, 4; `skip_bad_rows`"
    ):
        read_preferences(write(tmp_path / "pairs.jsonl", {}, GOOD, "oops", {"chosen": "x"}))


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(PreferenceError, match="line 2: byte 12 is not UTF-8"):
        read_preferences(path)


@pytest.mark.parametrize("kind", ["missing", "directory", "empty"])
def test_files_that_hold_nothing(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "pairs.jsonl"
    if kind == "directory":
        path.mkdir()
    elif kind == "empty":
        path.write_text("\n\n")
    expected = {"missing": "no such file", "directory": "is a directory", "empty": "holds no pair"}[kind]
    with pytest.raises(PreferenceError, match=expected) as caught:
        read_preferences(path)
    assert str(path) in str(caught.value)


IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
STANDARD = [
    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green, I think."},
    {"prompt": "Grün? ", "chosen": "ja", "rejected": "nein<|end|>"},
]
CONVERSATIONS = [pair.row() for pair in word_problems(4)]


@pytest.mark.parametrize("rows", [STANDARD, CONVERSATIONS], ids=["standard", "conversational"])
def test_token_ids_are_those_of_trl(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizer = byte_tokenizer()
    trainer = trl.DPOTrainer(
        str(save_tiny_model(tmp_path / "model")),
        args=trl.DPOConfig(output_dir=str(tmp_path / "out"), report_to=[], use_cpu=True, bf16=False),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    theirs = [{key: row[key] for key in IDS} for row in trainer.train_dataset]
    assert [encode(tokenizer, parse_preference(row)) for row in rows] == theirs
    mapped = feature_dataset(datasets.Dataset.from_list(rows), tokenizer)
    assert [{key: row[key] for key in IDS} for row in mapped] == theirs


def test_text_comes_back() -> None:
    tokenizer = byte_tokenizer()
    (feature,) = preference_features(tokenizer, CONVERSATIONS[:1])
    assert tokenizer.decode(feature["prompt_ids"]).endswith("<|start|>assistant\n")
    assert tokenizer.decode(feature["chosen_ids"]) == CONVERSATIONS[0]["chosen"][0]["content"] + "<|end|>\n"


def pair(prompt: str, chosen: str, rejected: str) -> Preference:
    return Preference(prompt, chosen, rejected)


def test_the_limit_cuts_the_end_and_drops_what_says_nothing() -> None:
    tokenizer = byte_tokenizer()
    pairs = [
        pair("12345", "abcdef", "xyz"),  # chosen is cut
        pair("1234567", "abc", "xyz"),  # one token of each is left
        pair("12345678", "abc", "xyz"),  # the prompt fills the limit
        pair("12345", "abcX", "abcY"),  # the difference is cut away
        pair("1", "ab", "xy"),
    ]
    with pytest.warns(PreferenceWarning, match="2 of 5 pairs are left out.* within max_length 8"):
        features = preference_features(tokenizer, pairs, 8)
    assert [tuple(len(f[key]) for key in IDS) for f in features] == [(5, 3, 3), (7, 1, 1), (1, 3, 3)]
    assert tokenizer.decode(features[0]["chosen_ids"]) == "abc"


def test_nothing_left() -> None:
    with pytest.raises(PreferenceError, match=r"max_length 3 \(the longest pair has 7 tokens\); raise"):
        preference_features(byte_tokenizer(), [pair("1234", "ab", "xy")], 3)


def test_a_conversation_needs_a_template_that_takes_it() -> None:
    conversation = parse_preference(CONVERSATIONS[0], "pairs.jsonl, line 7")
    with pytest.raises(PreferenceError, match=r"pairs\.jsonl, line 7: .* no chat template"):
        encode(byte_tokenizer(None), conversation)
    refuses = byte_tokenizer("{{ raise_exception('no system role') }}")
    with pytest.raises(PreferenceError, match=r"line 7: the model's chat template refuses .*no system role"):
        encode(refuses, conversation)
