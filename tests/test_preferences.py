"""Reading preference files: TRL's formats, and what is said of a file that has something else in it."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from infopo_kernels.commands.demo.word_problems import word_problems
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

from .training_fixtures import CHAT_TEMPLATE, byte_tokenizer, save_tiny_model, tiny_model


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
        {"chosen": "abc", "rejected": "ab"},
        {"chosen": "a", "rejected": "abc"},
        {"chosen": [user("Q"), assistant("a")], "rejected": [user("Q"), assistant("a"), user("R"), assistant("b")]},
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


ROW = '{"prompt": "a", "chosen": "b", "rejected": "c"}'


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("pairs.csv", b"prompt,chosen,rejected\na,b,c\n", r"table of separated values.*from_csv"),
        ("pairs.txt", b'"prompt"\t"chosen"\t"rejected"\na\tb\tc\n', r"table of separated values.*from_csv"),
        ("pairs.jsonl.gz", gzip.compress(ROW.encode()), r"compressed with gzip; unpack it"),
        ("pairs.jsonl", gzip.compress(ROW.encode()), r"compressed with gzip; unpack it"),
        ("pairs.zip", b"PK\x03\x04rest", r"zip archive; unpack it"),
        ("pairs.parquet", b"PAR1rest", r"Parquet.*from_parquet"),
        ("pairs.json", f"[\n  {ROW},\n  {ROW}\n]\n".encode(), r"one JSON array; write one JSON object a line"),
    ],
)
def test_other_formats_are_named(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(PreferenceError, match=rf"{re.escape(str(path))}: is .*{reason}"):
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


def test_responses_that_begin_one_another_have_their_end_to_score() -> None:
    tokenizer = byte_tokenizer()
    explicit = {"prompt": "Q", "chosen": "ab", "rejected": "a"}
    implicit = {"chosen": "Q: ab", "rejected": "Q: a"}
    for feature in preference_features(tokenizer, [explicit, implicit]):
        decoded = {tokenizer.decode(feature["prompt_ids"] + feature[f"{half}_ids"]) for half in ("chosen", "rejected")}
        assert {text[-7:] for text in decoded} == {"<|end|>"}
        assert scorable(feature)


# Bad rows.

ROWS = [GOOD, {**GOOD, "chosen": 3}, {"prompt": "Q2", "chosen": "c", "rejected": "d"}, {"prompt": "Q"}]


def report(caught: Any) -> str:
    (warning,) = [each for each in caught if issubclass(each.category, PreferenceWarning)]
    return str(warning.message)


def test_bad_rows_are_left_out_with_a_report_when_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", *ROWS, *["oops"] * 9)
    with pytest.raises(PreferenceError, match="line 2"):
        read_preferences(path)
    with pytest.warns(PreferenceWarning) as caught:
        pairs = read_preferences(path, skip_bad_rows=True)
    assert [pair.chosen for pair in pairs] == ["a", "c"]
    message = report(caught)
    assert message.startswith("11 of 13 rows cannot be used and are left out:")
    assert f"{path}, line 2, field `chosen`: expected a string" in message
    assert f"{path}, line 5: is not JSON" in message
    assert message.endswith("... and 6 more")


@pytest.mark.parametrize("kind", ["rows", "dataset", "stream"])
def test_bad_rows_of_every_source(kind: str) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{**GOOD, "chosen": chosen} for chosen in ("a", "", "c", "b")]
    tokenizer = byte_tokenizer()

    def features(skip: bool) -> list[dict[str, Any]]:
        if kind == "rows":
            return preference_features(tokenizer, rows, skip_bad_rows=skip)
        source = (
            datasets.Dataset.from_list(rows)
            if kind == "dataset"
            else datasets.IterableDataset.from_generator(lambda: iter(rows))
        )
        return list(feature_dataset(source, tokenizer, skip_bad_rows=skip))

    name = "row 1" if kind == "rows" else "train dataset, row 1"
    with pytest.raises(PreferenceError, match=f"^{name}, field `chosen`: is empty"):
        features(False)
    with pytest.warns(PreferenceWarning, match=f"{name}, field `chosen`: is empty"):
        kept = features(True)
    assert [tokenizer.decode(f["chosen_ids"]) for f in kept] == ["a<|end|>", "c<|end|>"]


def test_nothing_but_bad_rows_is_refused() -> None:
    with pytest.raises(PreferenceError, match=r"^row 0, field `chosen`.*1 more with problems: row 1"):
        preference_features(byte_tokenizer(), [{}, {}], skip_bad_rows=True)


def test_a_half_of_a_character_is_refused_from_memory_too() -> None:
    rows = [GOOD, {"prompt": [user("Q")], "chosen": [assistant("a")], "rejected": [[assistant("\ud83d")]]}]
    with pytest.raises(PreferenceError, match=r"^row 1, field `rejected\[0\]\[0\]\.content`: holds half") as caught:
        preference_features(byte_tokenizer(), rows)
    assert caught.value.where == "row 1"
    assert caught.value.field == "rejected[0][0].content"


# Several rejected responses, weights.


def test_several_rejected_responses_are_tokenised_like_single_ones() -> None:
    tokenizer = byte_tokenizer()
    standard = {"prompt": "Q", "chosen": " a", "rejected": [" b", " cd"], "weight": 2}
    conversation = {"prompt": [user("Q")], "chosen": A, "rejected": [B, [assistant("cd")]]}
    for row in (standard, conversation):
        (feature,) = preference_features(tokenizer, [row])
        for index, response in enumerate(row["rejected"]):
            (single,) = preference_features(tokenizer, [{**row, "rejected": response}])
            assert feature["rejected_ids"][index] == single["rejected_ids"]
            assert feature["chosen_ids"] == single["chosen_ids"]
        assert feature.get("weight") == row.get("weight")


def test_features_have_one_depth_and_keep_references() -> None:
    one = {**GOOD, "ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5}
    two = {**GOOD, "rejected": ["b", "c"], "ref_chosen_logps": -1.0, "ref_rejected_logps": [-2.0, -3.0]}
    first, second = preference_features(byte_tokenizer(), [one, two])
    assert first["rejected_ids"] == second["rejected_ids"][:1]
    assert first["ref_rejected_logps"] == [-2.5]
    assert second["ref_rejected_logps"] == [-2.0, -3.0]


def test_datasets_and_streams_have_the_features_of_rows() -> None:
    datasets = pytest.importorskip("datasets")
    tokenizer = byte_tokenizer()
    turns = [assistant("a"), user("b"), {**assistant("c"), "weight": 1}]
    rows = [
        {"prompt": [user("Q")], "chosen": turns, "rejected": [B, [assistant("cd")]], "weight": 0.5},
        {"prompt": [user("R")], "chosen": A, "rejected": [[assistant("x")]], "weight": 2.0},
        {"prompt": [user("R" * 100)], "chosen": A, "rejected": [B], "weight": 2.0},  # longer than the limit
    ]
    with pytest.warns(PreferenceWarning, match="1 of 3 pairs are left out"):
        expected = preference_features(tokenizer, rows, 90, score_turns="assistant")
    with pytest.warns(PreferenceWarning, match="1 of 3 pairs are left out"):
        table = feature_dataset(datasets.Dataset.from_list(rows), tokenizer, 90, score_turns="assistant")
    stream = feature_dataset(
        datasets.IterableDataset.from_generator(lambda: iter(rows)), tokenizer, 90, score_turns="assistant"
    )
    for made in (table, stream):
        assert [{key: row[key] for key in expected[0]} for row in made] == expected
    assert feature_dataset(table, tokenizer) is table


# Turns that are not scored.

TURNS = [assistant("one"), user("two"), assistant("three")]


def scored(tokenizer: Any, feature: dict[str, Any], half: str) -> str:
    pairs = zip(feature[f"{half}_ids"], feature[f"{half}_mask"], strict=True)
    return str(tokenizer.decode([token for token, mask in pairs if mask]))


def test_a_stream_keeps_weights_of_turns_that_only_later_rows_have() -> None:
    datasets = pytest.importorskip("datasets")
    turns = [
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "go on"},
        {"role": "assistant", "content": "y"},
    ]
    row = {"prompt": [{"role": "user", "content": "hi"}], "rejected": [{"role": "assistant", "content": "no"}]}
    rows = [row | {"chosen": turns}, row | {"chosen": [turns[0], turns[1] | {"weight": 0}, turns[2]]}]
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    first, second = feature_dataset(stream, byte_tokenizer())
    assert set(first["chosen_mask"]) == {1}
    assert second["chosen_mask"] == preference_features(byte_tokenizer(), rows[1:])[0]["chosen_mask"]
    assert 0 in second["chosen_mask"]


@pytest.mark.parametrize("bad", [{"rejected": None}, {"rejected": []}, {"chosen": None}])
@pytest.mark.parametrize("rejected", ["c", ["c", "d"]])
def test_a_bad_first_row_does_not_decide_what_a_table_holds(bad: dict[str, Any], rejected: Any) -> None:
    datasets = pytest.importorskip("datasets")
    good = {"prompt": "a", "chosen": "b", "rejected": rejected}
    if bad.get("rejected") == [] and isinstance(rejected, str):
        bad = {"rejected": ""}
    table = datasets.Dataset.from_list([good | bad, good])
    with pytest.raises(PreferenceError, match=r"row 0, field `(chosen|rejected)`: is"):
        feature_dataset(table, byte_tokenizer())
    with pytest.warns(PreferenceWarning, match="1 of 2 rows"):
        (feature,) = feature_dataset(table, byte_tokenizer(), skip_bad_rows=True)
    assert feature["rejected_ids"] == preference_features(byte_tokenizer(), [good])[0]["rejected_ids"]


@pytest.mark.parametrize("column", ["chosen", "rejected"])
def test_a_table_without_a_column_is_said(column: str) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    table = pytest.importorskip("datasets").Dataset.from_list([row]).remove_columns(column)
    with pytest.raises(PreferenceError, match=f"row 0, field `{column}`: is missing"):
        feature_dataset(table, byte_tokenizer())


def test_which_turns_are_scored() -> None:
    tokenizer = byte_tokenizer()
    row = {
        "prompt": [user("Q")],
        "chosen": TURNS,
        "rejected": [assistant("x"), {"role": "tool", "content": "t"}, assistant("y")],
    }
    (plain,) = preference_features(tokenizer, [row])
    assert "chosen_mask" not in plain  # as TRL's DPO: all that follows the prompt
    (feature,) = preference_features(tokenizer, [row], score_turns="assistant")
    assert {key: feature[key] for key in IDS} == plain
    assert scored(tokenizer, feature, "chosen") == "one<|end|>\nthree<|end|>\n"
    assert scored(tokenizer, feature, "rejected") == "x<|end|>\ny<|end|>\n"
    with pytest.raises(ValueError, match="score_turns"):
        preference_features(tokenizer, [row], score_turns="last")


@pytest.mark.parametrize(("score_turns", "chosen"), [("all", "<|start|>user\ntwo<|end|>\n"), ("assistant", "")])
def test_a_weight_of_a_message_leaves_its_turn_out(score_turns: str, chosen: str) -> None:
    tokenizer = byte_tokenizer()
    weighted = [{**turn, "weight": weight} for turn, weight in zip(TURNS, (0, 1, 0), strict=True)]
    row = {"prompt": [user("Q")], "chosen": weighted, "rejected": [[{**assistant("x"), "weight": 1}], TURNS]}
    feature = encode(tokenizer, parse_preference(row), score_turns=score_turns)
    assert scored(tokenizer, feature, "chosen") == chosen
    assert feature["rejected_mask"][0] == [1] * len(feature["rejected_ids"][0])
    assert nothing_to_score(feature) == (None if chosen else "the chosen response")


def test_turns_that_a_template_changes_later_cannot_be_told_apart() -> None:
    # Thinking of all turns but the last is left out, as Qwen3's template does.
    template = CHAT_TEMPLATE.replace(
        "{{ message['content'] }}",
        "{{ message['content'] if loop.last else message['content'].split('</think>')[-1] }}",
    )
    thinking = [assistant("<think>hm</think>one"), user("two"), assistant("<think>hm</think>three")]
    row = {"prompt": [user("Q")], "chosen": thinking, "rejected": B}
    tokenizer = byte_tokenizer(template)
    preference_features(tokenizer, [row])
    with pytest.raises(PreferenceError, match=r"row 0, field `chosen\[0\]`: .*cannot be told"):
        preference_features(tokenizer, [row], score_turns="assistant")


# Prompts that a template renders otherwise when a reply follows.

MULTI = {"prompt": [user("Q"), assistant("A"), user("Last question")], "chosen": TURNS, "rejected": B}
SINGLE = {"prompt": [{"role": "system", "content": "S"}, user("Last question")], "chosen": A, "rejected": B}
_LAST_USER = "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"


@pytest.mark.parametrize(
    ("template", "row"),
    [
        ("{{ messages | length }} messages\n" + CHAT_TEMPLATE, SINGLE),
        (
            "{{ messages | length }} messages\n" + CHAT_TEMPLATE.replace("['content'] }}", "['content'] | upper }}"),
            SINGLE,
        ),
        (CHAT_TEMPLATE.replace("{{ message['role'] }}", "{{ message['role'] }} {{ loop.revindex }}"), SINGLE),
        (
            # The system line, or the tools, stand before the last user message (Mistral).
            _LAST_USER
            + CHAT_TEMPLATE.replace(
                "{{ message['content'] }}", "{% if message == users[-1] %}Tools. {% endif %}{{ message['content'] }}"
            ),
            MULTI,
        ),
        (
            CHAT_TEMPLATE.replace("{% for message in messages %}", "{% for message in messages[-2:] %}"),  # forgets
            MULTI,
        ),
    ],
    ids=["counts", "counts-in-capitals", "counts-in-each-header", "before-the-last-turn", "window"],
)
def test_a_prompt_whose_last_turn_changes_is_refused(template: str, row: dict[str, Any]) -> None:
    with pytest.raises(PreferenceError, match=r"^row 0, field `prompt`: .* part of the prompt would be scored"):
        preference_features(byte_tokenizer(template), [row])


@pytest.mark.parametrize(
    ("template", "lost"),
    [
        # The generation prompt opens a thought that the finished conversation does not have.
        (CHAT_TEMPLATE.replace("<|start|>assistant\n{%", "<|start|>assistant\n<think>{%"), "<think>"),
        # Its header is not that of an assistant's message.
        (CHAT_TEMPLATE.replace("<|start|>assistant\n{%", "<|start|>bot\n{%"), "bot\\n"),
        # A mark after the last message.
        (CHAT_TEMPLATE.replace("<|end|>", "{% if loop.last %} /think{% endif %}<|end|>"), " /think<"),
    ],
    ids=["thought", "header", "mark"],
)
def test_a_prompt_whose_end_changes_is_counted(template: str, lost: str) -> None:
    tokenizer = byte_tokenizer(template)
    with pytest.warns(PreferenceWarning) as caught:
        features = preference_features(tokenizer, [SINGLE, {**SINGLE, "chosen": [assistant("z")]}])
    message = report(caught)
    assert message.startswith("2 of 2 pairs: the prompt tokenised alone is not what")
    assert lost in message
    datasets = pytest.importorskip("datasets")
    with pytest.warns(PreferenceWarning, match=r"^2 of 2 pairs: .*first: train dataset, row 0"):
        feature_dataset(datasets.Dataset.from_list([SINGLE, SINGLE]), tokenizer)
    assert (
        tokenizer.decode(features[0]["prompt_ids"])
        .rstrip("/")
        .endswith(("assistant\n", "<|start|>", "question", "question "))
    )


def test_tokens_that_merge_at_the_boundary_are_counted() -> None:
    class Merging:
        """One token a word with the space before it."""

        eos_token = ""

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [hash(word) % 1000 for word in text.replace(" ", "| ").split("|") if word]}

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return f"{len(ids)} tokens"

    rows = [
        {"prompt": "the sk", "chosen": "y is", "rejected": "in was"},
        {"prompt": "a", "chosen": " b", "rejected": " c"},
    ]
    with pytest.warns(PreferenceWarning, match=r"^1 of 2 pairs: .*first: row 0, where '1 tokens'"):
        first, _ = preference_features(Merging(), rows)
    assert len(first["prompt_ids"]) == 1
    with pytest.warns(PreferenceWarning, match="row 7"):
        encode(Merging(), parse_preference(rows[0], "row 7"))


# What can be scored, and what a model can take.


def feature(chosen: list[int], rejected: Any, prompt: tuple[int, ...] = (4,), **masks: Any) -> dict[str, Any]:
    return {"prompt_ids": list(prompt), "chosen_ids": chosen, "rejected_ids": rejected, **masks}


@pytest.mark.parametrize(
    ("case", "missing", "usable"),
    [
        (feature([5], [6]), None, True),
        (feature([], [6]), "the chosen response", False),
        (feature([5], [6], prompt=()), "the chosen response", False),  # nothing predicts a first token
        (feature([5, 6], [6], prompt=()), "the rejected response", False),
        (feature([5, 6], [[6, 7], [6]], prompt=()), "rejected response 1", False),
        (feature([5], [5]), None, False),
        (feature([5], [[6], [5]]), None, False),
        (feature([5], [[6], [7]]), None, True),
        (feature([5, 6], [7], chosen_mask=[0, 0], rejected_mask=[1]), "the chosen response", False),
        (feature([5, 6], [[7], [8]], chosen_mask=[0, 1], rejected_mask=[[1], [0]]), "rejected response 1", False),
        (feature([5, 6], [7, 8], prompt=(), chosen_mask=[1, 0], rejected_mask=[0, 1]), "the chosen response", False),
    ],
)
def test_what_can_be_scored(case: dict[str, Any], missing: str | None, usable: bool) -> None:
    assert nothing_to_score(case) == missing
    assert scorable(case) == usable


def test_a_cut_takes_the_masks_along() -> None:
    whole = feature([5, 6, 7], [[6, 7], [8, 9, 10]], chosen_mask=[0, 1, 1], rejected_mask=[[1, 1], [0, 0, 1]])
    assert cut(whole, None) is whole
    assert cut(whole, 3) == feature([5, 6], [[6, 7], [8, 9]], chosen_mask=[0, 1], rejected_mask=[[1, 1], [0, 0]])
    assert cut(whole, 1) == feature([], [[], []], chosen_mask=[], rejected_mask=[[], []])


LEARNED = {  # architecture: its options, learned positions
    "gpt2": ({"n_positions": 24}, 24),
    "opt": (
        {"max_position_embeddings": 24, "ffn_dim": 48, "word_embed_proj_dim": 32},
        24,
    ),  # two rows more in its table
    "gpt_neo": (
        {"max_position_embeddings": 24, "num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]]},
        24,
    ),
    "xlm-roberta": (
        {"max_position_embeddings": 26, "pad_token_id": 1, "is_decoder": True},
        24,
    ),  # padding takes two rows
    "mpt": ({"max_seq_len": 24, "d_model": 32, "n_layers": 2, "n_heads": 2}, 24),
    "gptj": ({"n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8}, 24),  # a table of sines
}


@pytest.mark.parametrize("architecture", LEARNED)
def test_the_longest_pair_is_compared_with_learned_positions(architecture: str) -> None:
    options, positions = LEARNED[architecture]
    model = tiny_model(architecture, **options)
    longest = feature([5] * (positions - 1), [6])
    ids = longest["prompt_ids"] + longest["chosen_ids"]
    model(torch.tensor([ids]))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.tensor([[*ids, 5]]))
    for source in (model, model.config):
        check_features([longest], source)
        with pytest.raises(
            PreferenceError, match=rf"^pair 1, field `chosen`: .* {positions + 1} tokens.* for {positions};"
        ):
            check_features([longest, feature([5] * positions, [6])], source)
        with pytest.raises(PreferenceError, match=r"field `rejected\[1\]`"):
            check_features([feature([5], [[6], [6] * positions])], source)


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_positions_without_a_table_have_no_end(architecture: str) -> None:
    options = {"n_layer": 2, "n_head": 2} if architecture == "bloom" else {"max_position_embeddings": 8}
    model = tiny_model(architecture, **options)
    long = feature([5] * 40, [6])
    check_features([long], model)
    model(torch.tensor([long["chosen_ids"]]))


@pytest.mark.parametrize("several", [False, True])
def test_tables_are_checked_by_columns(several: bool) -> None:
    datasets = pytest.importorskip("datasets")
    options, positions = LEARNED["gpt2"]
    model = tiny_model("gpt2", **options)

    def table(*responses: list[int]) -> Any:
        rows = [feature([5], [[6], each] if several else each) for each in responses]
        return datasets.Dataset.from_list([feature([5], [[6]] if several else [6]), *rows, rows[0]]).select([0, 1])

    name = r"rejected\[1\]" if several else "rejected"
    check_features(table([6] * (positions - 1)), model)
    with pytest.raises(
        PreferenceError, match=f"^pair 1, field `{name}`: prompt and response have {positions + 1} tokens"
    ):
        check_features(table([6] * positions), model)
    check_features(table([6] * positions), model, max_length=positions)
    with pytest.raises(PreferenceError, match=f"^pair 1, field `{name}`: holds the token id 259"):
        check_features(table([6, 259]), model)
    check_features(table([6, 258]), model)


def test_the_largest_id_is_compared_with_the_embeddings() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>"])
    model = tiny_model()
    rows = [GOOD, {"prompt": "Q", "chosen": "a", "rejected": "<think>b"}]
    for source in (model, model.config):
        with pytest.raises(
            PreferenceError, match=r"^row 1, field `rejected`: holds the token id 259.*ids below 259.*resize"
        ):
            preference_features(tokenizer, rows, model=source)
    model.resize_token_embeddings(260)
    assert len(preference_features(tokenizer, rows, model=model)) == 2
