"""Tokenisation: equal to TRL's, with the length limit of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infopo_kernels.training.data import Preference, parse_preference
from infopo_kernels.training.errors import UserError
from infopo_kernels.training.tokens import Example, tokenize
from infopo_kernels.commands.demo.word_problems import word_problems

from .training_fixtures import byte_tokenizer, save_tiny_model

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
    ours = tokenize(tokenizer, map(parse_preference, rows), None).examples
    theirs = [Example(r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) for r in trainer.train_dataset]
    assert ours == theirs


def test_text_comes_back() -> None:
    tokenizer = byte_tokenizer()
    (example,) = tokenize(tokenizer, [parse_preference(CONVERSATIONS[0])], None).examples
    assert tokenizer.decode(example.prompt).endswith("<|start|>assistant\n")
    assert tokenizer.decode(example.chosen) == CONVERSATIONS[0]["chosen"][0]["content"] + "<|end|>\n"


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
    result = tokenize(tokenizer, pairs, 8)
    lengths = [(len(e.prompt), len(e.chosen), len(e.rejected)) for e in result.examples]
    assert lengths == [(5, 3, 3), (7, 1, 1), (1, 3, 3)]
    assert (result.truncated, result.dropped) == (2, 2)
    assert tokenizer.decode(result.examples[0].chosen) == "abc"


def test_nothing_left() -> None:
    with pytest.raises(UserError, match=r"--max-length 3 \(the longest pair has 7 tokens\); raise"):
        tokenize(byte_tokenizer(), [pair("1234", "ab", "xy")], 3)


def test_a_conversation_needs_a_template_that_takes_it() -> None:
    conversation = parse_preference(CONVERSATIONS[0], "pairs.jsonl, line 7")
    with pytest.raises(UserError, match=r"pairs\.jsonl, line 7: .* no chat template"):
        tokenize(byte_tokenizer(None), [conversation], None)
    refuses = byte_tokenizer("{{ raise_exception('no system role') }}")
    with pytest.raises(UserError, match=r"line 7: the model's chat template refuses .*no system role"):
        tokenize(refuses, [conversation], None)
