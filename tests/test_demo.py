"""The demo on a tiny model: the same path as with SmolLM2, in seconds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from infopo_kernels.cli import main
from infopo_kernels.training.head_memory import HeadShape, measure_head_memory
from infopo_kernels.training.loop import History
from infopo_kernels.training.report import claim

from .training_fixtures import save_tiny_model

for needed in ("transformers", "rich", "matplotlib"):
    pytest.importorskip(needed)

METRICS = (
    *("loss", "chosen_logps", "rejected_logps", "chosen_log_ratio", "rejected_log_ratio", "reward_accuracy"),
    *("mi_lower_bound", "rejected_weight", "seconds", "peak_memory_mib"),
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: Any) -> Path:
    root = tmp_path_factory.mktemp("demo")
    model = save_tiny_model(root / "model", initializer_range=0.1)
    words = ["demo", "--model", str(model), "--output", str(root / "out"), "--pairs", "12", "--held-out", "4"]
    assert main([*words, "--steps", "4", "--lr", "1e-3"]) == 0
    return root / "out"


def records(demo: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (demo / "metrics.jsonl").read_text().splitlines()]


def test_metrics_of_every_step_and_both_losses(demo: Path) -> None:
    for loss in ("infopo", "dpo"):
        steps = [r for r in records(demo) if r["objective"] == loss and r["split"] == "train"]
        assert [r["step"] for r in steps] == [1, 2, 3, 4]
        assert all(math.isfinite(r[name]) for r in steps for name in METRICS)


def test_both_losses_start_alike(demo: Path) -> None:
    first = [r for r in records(demo) if r["split"] == "held_out" and r["step"] == 0]
    assert len(first) == 2
    assert first[0]["chosen_logps"] == first[1]["chosen_logps"]
    assert all(r["reward_accuracy"] == 0.5 and r["chosen_log_ratio"] == 0 for r in first)
    assert all(r["mi_lower_bound"] == pytest.approx(-math.exp(-1)) for r in first)


def test_the_model_loads_and_the_plot_is_one(demo: Path) -> None:
    from matplotlib.image import imread
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(demo / "model")
    AutoTokenizer.from_pretrained(demo / "model")
    height, width, _ = imread(demo / "training.png").shape
    assert width >= 1500
    assert height >= 500


def test_held_out_pairs_are_not_trained_on(demo: Path) -> None:
    train, held_out = (
        {json.loads(line)["prompt"][-1]["content"] for line in (demo / name).read_text().splitlines()}
        for name in ("train.jsonl", "held_out.jsonl")
    )
    assert (len(train), len(held_out)) == (12, 4)
    assert not train & held_out


def test_it_can_be_run_again_over_itself_and_be_short_of_time(demo: Path, tmp_path: Path, capsys: Any) -> None:
    model = save_tiny_model(tmp_path / "model", initializer_range=0.1)
    words = ["demo", "--model", str(model), "--pairs", "12", "--held-out", "4", "--steps", "50"]
    for _ in range(2):
        assert main([*words, "--output", str(tmp_path / "out"), "--minutes", "0.001"]) == 0
    assert "Stopped after 1 of 50 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("infopo", "dpo", "verdict"),
    [(2.0, -1.0, "as the paper says"), (2.0, 1.0, "DPO does not lose it"), (-1.0, -3.0, "does not show")],
)
def test_the_claim_is_judged_by_the_run(infopo: float, dpo: float, verdict: str) -> None:
    history = History()
    for loss, change in (("infopo", infopo), ("dpo", dpo)):
        for step, value in ((0, -50.0), (9, -50.0 + change)):
            history.records.append({"objective": loss, "split": "held_out", "step": step, "chosen_logps": value})
    said = claim(history)
    assert verdict in said
    assert f"{infopo:+.2f} nats under InfoPO, {dpo:+.2f} nats under DPO" in said


def test_memory_of_the_head_is_measured() -> None:
    """Naive logits, their log-softmax and its gradient are three matrices; the fused op stays within its workspace."""
    shape = HeadShape(sequences=4, length=64, prompt=8, width=32, vocabulary=50_000, workspace_mib=8)
    peak = measure_head_memory(shape)
    if peak["naive"] is None:
        pytest.skip("the system does not let a process reset its peak")
    logits = shape.sequences * shape.length * shape.vocabulary * 4 / 2**20
    assert peak["naive"] > 2 * logits
    assert peak["fused"] is not None
    assert peak["fused"] < 8 + 10, "workspace, and vectors and libraries"
