"""The parts of benchmarks/ besides the comparison: limits of memory, records that keep old rows, targets."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("pandas")
pytest.importorskip("matplotlib")
pytest.importorskip("pytest_benchmark")

from benchmarks import records
from benchmarks.__main__ import main
from benchmarks.cases import SHAPES, Shape
from benchmarks.measure.environment import environment
from benchmarks.parts import cpu_targets, long_context_training, packing, tuning_sweep
from benchmarks.parts.long_context_training import Model, Setup
from infopo_kernels.backends.dispatch import unavailable_reason
from tests.training_fixtures import save_tiny_model


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
@pytest.mark.parametrize("way", ["fused", "naive"])
def test_naive_logits_fail_under_a_limit_that_the_fused_head_keeps(way: str) -> None:
    limit = 200  # MiB; the logits of 2048 tokens are 128, and naive log-probabilities need several of that size
    model = Model(hidden=64, layers=1, vocabulary=16384)
    row = long_context_training.measure(Setup(way, 2048, model, limit / 1024, "cpu"))
    if way == "fused":
        assert row["peak_mib"] < limit
        return
    assert "allocate" in row["failed"]
    assert row["asked_mib"] == pytest.approx(128, rel=0.01)
    assert row["held_mib"] < limit < row["held_mib"] + row["asked_mib"]


def test_a_part_of_the_long_context_record_keeps_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(setup: Setup) -> dict[str, Any]:
        row: dict[str, Any] = {"way": setup.way, "tokens": setup.tokens, "seconds": 1.0}
        failed = setup.way == "naive" and setup.tokens > 8192
        return row | ({"failed": "no", "held_mib": 1.0, "asked_mib": 2.0} if failed else {"peak_mib": 64.0})

    monkeypatch.setattr(long_context_training, "measure", measured)
    output, folder = ["--device", "cpu", "--output", str(tmp_path)], tmp_path / environment()["processor"]
    for words in (["--tokens", "32768", "--ways", "naive"], ["--tokens", "32768", "8192", "--ways", "fused"]):
        assert main(["long-context-training", *words, *output]) == 0
    rows = records.load(folder)["long-context-training"].rows
    assert sorted(zip(rows["tokens"], rows["way"], strict=True)) == [
        (8192, "fused"), (32768, "fused"), (32768, "naive"),
    ]  # fmt: skip
    assert (folder / "long-context-training.png").read_bytes().startswith(b"\x89PNG")
    assert "held 1, asked for 2 more" in capsys.readouterr().out.replace("\n", "")
    assert main(["long-context-training", "--tokens", "8192", "--hidden", "64", *output]) == 0
    rows = records.load(folder)["long-context-training"].rows
    assert len(rows) == 2, "another shape begins another record"


def test_cpu_targets_merge_by_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part at a size that takes seconds. Targets are met or missed as the figures say."""
    monkeypatch.setattr(cpu_targets, "LENGTHS", {"SmolLM2-135M": 16})
    monkeypatch.setattr(cpu_targets, "LONG", 128)
    monkeypatch.setattr(cpu_targets, "PEERS", ("naive PyTorch", "F.linear_cross_entropy"))
    monkeypatch.setitem(SHAPES, "SmolLM2-135M", Shape("SmolLM2-135M", 48, 301))
    if reason := unavailable_reason("cpp", torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    output = ["--output", str(tmp_path), "--dtypes", "float32"]
    for part in ("speed", "memory,long", "speed,accuracy"):
        assert main(["cpu-targets", "--parts", part, *output]) == 0
    rows = records.load(tmp_path / environment()["processor"])["cpu-targets"].rows
    assert not rows.duplicated(["case", "what"]).any()
    assert {case.rpartition(": ")[2] for case in rows["case"]} == {"speed", "memory", "long context", "accuracy"}
    by = rows.set_index("what")
    assert by.loc["gradients of two runs differ (0: bitwise equal)", "met"]
    ratio = by.loc["times faster than naive PyTorch"]
    assert ratio["met"] == (ratio["figure"] >= 1.0)
    exact, gone = (by.loc[f"seconds: {name}", "figure"] for name in ("step", "underflowed"))
    assert by.loc["all rejected weights underflowed / exact", "figure"] == pytest.approx(gone / exact)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A small random model and tokenizer instead of SmolLM2's."""
    folder = tmp_path / "model"
    save_tiny_model(folder)
    for module in (packing, tuning_sweep):
        monkeypatch.setattr(module, "smollm2_directory", lambda: folder)
    return folder


def test_packing_scores_the_same_in_every_layout(tiny: Path, tmp_path: Path) -> None:
    assert main(["packing", "--pairs", "2", "--repeats", "2", "--output", str(tmp_path)]) == 0
    rows = records.load(tmp_path / environment()["processor"])["packing"].rows
    assert rows["tokens"].is_monotonic_decreasing
    assert list(rows["loss"]) == pytest.approx([rows["loss"][0]] * 3, rel=1e-5)
    assert rows["seconds"].map(len).eq(2).all()


@pytest.mark.parametrize("loss", ["infopo", "dpo"])
def test_the_sweeps_loss_is_the_formula(loss: str) -> None:
    setting = tuning_sweep.Setting(beta=0.3, lr=1e-3, max_log_weight=0.0 if loss == "infopo" else None, loss=loss)
    logps = torch.tensor([-3.0, -2.0, -4.0, -1.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-3.5, -1.0, -3.0, -9.0], dtype=torch.float64)
    chosen, rejected = (0.3 * (logps - reference)).detach().chunk(2)
    if loss == "infopo":
        a = rejected - 1  # the second is above the cap of 0, where exp continues as its tangent
        expected = (-chosen + torch.stack([a[0].exp(), 1 + a[1]])).mean()
        weight = 0.3 * torch.stack([a[0].exp(), torch.ones(())]).mean()
    else:
        expected = (1 + (rejected - chosen).exp()).log().mean()
        weight = 0.3 * (1 / (1 + (chosen - rejected).exp())).mean()
    value, metrics = tuning_sweep._loss(logps, reference, setting)
    torch.testing.assert_close(value.detach(), expected)
    (gradient,) = torch.autograd.grad(value, logps)
    assert metrics["rejected_weight"] == pytest.approx(float(weight))
    assert float(gradient[2:].sum()) == pytest.approx(metrics["rejected_weight"])
    assert metrics["chosen_log_ratio"] == pytest.approx(-0.25)
    assert metrics["reward_accuracy"] == 0.5


def test_a_sweep_runs_what_is_missing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [tuning_sweep.Setting(0.1, lr, lora_rank=rank) for lr, rank in ((1e-3, None), (1e-2, 2))]
    monkeypatch.setattr(tuning_sweep, "SETTINGS", [*settings, replace(settings[0], loss="dpo")])
    words = ["tuning-sweep", "--steps", "3", "--batch", "2", "--held-out", "3", "--output", str(tmp_path)]
    folder = tmp_path / environment()["processor"]
    assert main([*words, "--only", "infopo"]) == 0
    first = records.load(folder)["tuning-sweep"].rows
    assert main(words) == 0
    rows = records.load(folder)["tuning-sweep"].rows
    assert list(rows["run"]) == [setting.name for setting in tuning_sweep.SETTINGS]
    assert list(rows["seconds"][:2]) == list(first["seconds"]), "what was there is not run again"
    for run in rows.to_dict("records"):
        train = run["train"]
        assert [step["learning_rate"] / run["lr"] for step in train] == pytest.approx([1, 2 / 3, 1 / 3])
        assert train[0]["chosen_log_ratio"] == pytest.approx(0, abs=1e-4), "the first step's batch is the reference's"
        assert abs(train[-1]["chosen_log_ratio"]) > 1e-3
        assert train[0]["rejected_weight"] == pytest.approx(
            run["beta"] * (0.5 if run["loss"] == "dpo" else math.exp(-1))
        )
        assert run["after"]["chosen_log_ratio"] != 0


@pytest.mark.parametrize("gib", [1.0, 3 * 4 * 2 * 100 / 2**30], ids=["room", "little room"])
def test_bare_products_take_all_rows_where_memory_allows(gib: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """And as many operations where it does not."""
    pytest.importorskip("triton")
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.gpu import gpu_kernels
    from infopo_kernels.backends.base import Head

    n, h, v = 8, 16, 100
    x, w = torch.ones(n, h, dtype=torch.bfloat16), torch.ones(v, h, dtype=torch.bfloat16)
    head = Head(x, w, None, None, 1.0, 0)
    monkeypatch.setattr(gpu_kernels, "available_gib", lambda device: gib)
    rows = gpu_kernels.bare_rows(head)
    assert rows == (n if gib == 1.0 else 3)
    for count in (1, 2, 3):
        with FlopCounterMode(display=False) as counter:
            gpu_kernels.bare_products(head, count, rows)()
        assert counter.get_total_flops() == count * 2 * n * h * v


def test_tables_of_first_contact_say_which_bare_products_were_measured() -> None:
    pytest.importorskip("triton")
    import pandas as pd

    from benchmarks.gpu.first_contact import BARE_ROWS, SPLIT_ROWS, N, bare_text

    whole, half = pd.DataFrame([{BARE_ROWS: N}, {"ms": 1.0}]), pd.DataFrame([{BARE_ROWS: N // 2}, {BARE_ROWS: N}])
    assert bare_text(whole) == "bare products"
    assert bare_text(half) == "bare products of 4096 rows at a time"
    assert bare_text(pd.DataFrame([{"ms": 1.0}])) == f"bare products of {SPLIT_ROWS} rows at a time"
    assert SPLIT_ROWS == 3533


def test_first_contact_knows_the_librarys_kernels() -> None:
    """By the names in the record of an H100."""
    from benchmarks.gpu.first_contact import LIBRARY

    rows = records.read(records.RESULTS / "nvidia-h100-80gb-hbm3" / "first-contact.json").rows
    names = set(rows[rows["section"] == "kernels"]["kernel"])
    found = {name for name in names if LIBRARY.search(name)}
    assert {name for name in names if name.startswith(("nvjet", "void cublasLt"))} == found
    assert len(found) > 5
