"""The benchmark suite: right values of every contender, honest timing, records, comparison, plots and the page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("pytest_benchmark")

from infopo_kernels import naive
from infopo_kernels.bench import compare, isolated, main, report, timing, train_steps
from infopo_kernels.bench.batches import CASES, Batch, Case, make_batch
from infopo_kernels.bench.contenders import CONTENDERS, FLOOR, OURS, Contender, Naive, floor
from infopo_kernels.bench.plan import DTYPES, MAIN_SHAPE, SpeedPoint, default_plan
from infopo_kernels.bench.shapes import SHAPES, Shape
from infopo_kernels.bench.truth import check, run, truth
from infopo_kernels.objectives import InfoPOOptions

CPU = torch.device("cpu")
SMALL = Shape("small", 48, 301)
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def small(case: Case, dtype: torch.dtype = torch.float32) -> Batch:
    return make_batch(case, SMALL, 2, 12, dtype, CPU)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_the_truth_is_the_reference(case: Case) -> None:
    """What contenders are checked against equals autograd through materialised logits in float64."""
    batch, right = small(case), truth(small(case), torch.float64)
    hidden, weight = (t.detach().double().requires_grad_() for t in (batch.hidden, batch.weight))
    loss = naive.linear_preference_loss(
        hidden,
        weight,
        batch.labels,
        cu_seqlens=batch.cu_seqlens if case.packed else None,
        is_chosen=batch.is_chosen,
        objective=InfoPOOptions(beta=batch.beta, average=True),
    )
    loss.backward()
    torch.testing.assert_close(right.loss, loss.detach(), rtol=1e-12, atol=1e-12)
    for name, leaf in (("hidden", hidden), ("weight", weight)):
        assert (name in right.gradients) == (name in case.trained)
        if name in case.trained:
            torch.testing.assert_close(right.gradients[name], leaf.grad, rtol=1e-9, atol=1e-12)


def test_rejected_weights_are_live_or_underflowed() -> None:
    middle = 2 * 12
    for name, expected in (("step", True), ("underflowed", False)):
        gradient = truth(small(CASES[name]), torch.float64).gradients["hidden"].flatten(0, 1)
        size = gradient[middle:].abs().max() / gradient[:middle].abs().max()
        assert (float(size) > 0.01) == expected, f"{name}: {float(size)}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("contender", CONTENDERS.values(), ids=list(CONTENDERS))
def test_values_of_every_contender(contender: Contender, dtype: str, fresh_compiler: None) -> None:
    """Loss and gradients in every case, and the log-probabilities."""
    for case in CASES.values():
        if contender.compiles and case.name not in ("step", "half-prompt"):
            continue  # compiling takes seconds; in a run every case is checked before it is timed
        if reason := contender.unsupported_reason(case, CPU, DTYPES[dtype]):
            if not contender.compiles or case.name == "step":
                pytest.skip(reason)
            continue
        batch = small(case, DTYPES[dtype])
        right = truth(batch, torch.float64)
        assert check(contender, batch, right) is None
        if contender.compiles or case.name not in ("half-prompt", "packed"):
            continue
        with torch.no_grad():
            got = contender.sequence_logps(batch).double()
        torch.testing.assert_close(
            got, batch.sequence_sums(right.token_logps), rtol=1e-5 if dtype == "float32" else 1e-2, atol=1e-3
        )


class _Wrong(Naive):
    """Scores each row on its neighbour's label."""

    def token_logps(self, batch: Batch) -> torch.Tensor:
        return super().token_logps(replace(batch, labels=batch.labels.roll(1, -1)))


class _Halved(Naive):
    """Gives half of each gradient, and the right loss."""

    def loss(self, batch: Batch) -> torch.Tensor:
        loss = super().loss(batch)
        return loss / 2 + loss.detach() / 2


def test_wrong_values_are_found() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        batch = small(CASES["step"], dtype)
        right = truth(batch, torch.float32)
        assert check(Naive(), batch, right) is None
        assert "wrong" in (check(_Wrong(), batch, right) or "")
        assert "gradient" in (check(_Halved(), batch, right) or "")
    frozen = small(CASES["frozen"])
    right = truth(frozen, torch.float32)
    frozen.weight.requires_grad_()
    assert "frozen" in (check(Naive(), frozen, right) or "")


@pytest.mark.parametrize("name", list(CASES))
def test_the_floor_is_the_products_that_the_case_needs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, work = small(CASES[name]), []
    original = torch.mm

    def counted(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        work.append(a.shape[0] * a.shape[1] * b.shape[1])
        return original(a, b, out=out)

    monkeypatch.setattr(torch, "mm", counted)
    floor(batch)()
    scored = {"half-prompt": 24, "packed": 36}.get(name, 48)
    products = {"forward": scored, "frozen": 2 * scored, "underflowed": 3 * 24 + 24}.get(name, 3 * scored)
    assert sum(work) == products * SMALL.vocab * SMALL.hidden


def test_repetitions_are_interleaved_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call(name: str, seconds: float) -> Any:
        def act() -> None:
            order.append(name)
            now[0] += seconds

        return act

    calls = {"a": call("a", 0.25), "b": call("b", 0.75), "c": call("c", 1.0), "d": call("d", 9.0)}
    times = timing.interleave(calls, 4, 0.5, lambda: None)
    # All but a are past their half second after one; b has its three within PATIENCE, c two, d no more than it must.
    assert order == ["a", "b", "c", "d", "b", "c", "a", "a", "b"]
    assert times == {"a": [0.25] * 3, "b": [0.75] * 3, "c": [1.0] * 2, "d": [9.0]}
    assert timing.interleave({"a": call("a", 0.1)}, 4, 0.5, lambda: None) == {"a": [pytest.approx(0.1)] * 4}
    assert timing.interleave({}, 4, 5.0, lambda: None) == {}  # none of them can run


def test_a_failure_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, batch: Batch) -> torch.Tensor:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(type(CONTENDERS["TRL"]), "loss", broken)
    monkeypatch.setattr(type(CONTENDERS["TRL"]), "unsupported_reason", lambda *_: None)
    monkeypatch.setitem(timing.SHAPES, "small", SMALL)
    plan = replace(default_plan(), peers=(OURS, "TRL"), rounds=2)
    measured = timing.measure(SpeedPoint("small", "step", "float32", 2, 12), plan)
    assert measured.skipped == {"TRL": "RuntimeError: no such kernel"}
    assert set(measured.seconds) == {OURS, FLOOR}
    assert all(len(each) == 2 for each in measured.seconds.values())
    huge = Shape("huge", 1 << 20, 1 << 24)
    monkeypatch.setitem(timing.SHAPES, "huge", huge)
    assert "GiB" in timing.measure(SpeedPoint("huge", "step", "float32", 2, 12), plan).skipped[OURS]


def _setup(contender: str, memory_gib: float = 4.0, **more: Any) -> isolated.Setup:
    fields: dict[str, Any] = {"case": "step", "dtype": "float32", "pairs": 1, "length": 1024, "device": "cpu", **more}
    return isolated.Setup(contender, Shape("wide", 16, 32768), threads=1, memory_gib=memory_gib, **fields)


def test_memory_in_a_fresh_process() -> None:
    """Naive logits are seen (two copies of 256 MiB at the least); so is a limit, as a failure."""
    naive = isolated.measure_step(_setup("naive PyTorch"))
    assert 500 < naive["peak_mib"] < 1100
    assert "out of memory" in isolated.measure_step(_setup("naive PyTorch", memory_gib=0.3))["failed"]
    ours = isolated.measure_step(_setup(OURS))
    assert ours["peak_mib"] < 64


def _die(argument: Any) -> dict[str, Any]:
    import os

    os._exit(7)


def _sleep(argument: Any) -> dict[str, Any]:
    import time

    time.sleep(60)
    return {}


def test_a_process_that_dies_or_hangs_is_a_row() -> None:
    assert "7" in isolated.in_fresh_process(_die, None, 1.0, 30.0)["failed"]
    assert "longer" in isolated.in_fresh_process(_sleep, None, 1.0, 0.5)["failed"]


def test_training_steps_take_turns_on_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    small_model = {**train_steps._CONFIG, "hidden_size": 18, "num_hidden_layers": 1, "vocab_size": 301}
    monkeypatch.setattr(train_steps, "_CONFIG", small_model)
    monkeypatch.setattr(train_steps, "give_back_at_once", lambda: None)
    monkeypatch.setattr(train_steps, "keep_what_is_freed", lambda: None)
    monkeypatch.setattr(train_steps, "in_fresh_process", lambda function, argument, *_, **__: function(argument))
    calls = []

    def failing_second(self: Any, batch: Batch) -> torch.Tensor:
        calls.append(batch)
        if len(calls) > 1:
            raise RuntimeError("out of turns")
        return Naive().loss(batch)

    monkeypatch.setattr(type(CONTENDERS["TRL"]), "loss", failing_second)
    monkeypatch.setattr(type(CONTENDERS["TRL"]), "unsupported_reason", lambda *_: None)
    plan = replace(default_plan(), peers=(OURS, "naive PyTorch", "TRL"), training_length=12, training_steps=3)
    ours, naive, failed = train_steps.training(plan, lambda text: None)
    assert len(ours["each"]) == len(naive["each"]) == 3
    assert ours["losses"] == pytest.approx(naive["losses"], rel=1e-3)  # two small steps apart
    assert failed["failed"] == "RuntimeError: out of turns"
    (table,) = report._training({"rows": [ours, naive, failed]})
    assert [row[4] for row in table.rows] == ["3", "3", ""]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run through the command, at sizes that take seconds."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, MAIN_SHAPE, SMALL)
        arguments = [
            "--quick", "--parts", "speed,accuracy", "--peers", "naive,F.linear", "--cases", "step,packed",
            "--dtypes", "float32,bfloat16", "--rounds",
            "3", "--product-gflop", "0.002", "--output", str(folder), "--docs", str(folder / "page.md"),
        ]  # fmt: skip
        assert main(arguments) == 0
    return folder


def test_the_record_is_of_pytest_benchmark(small_run: Path) -> None:
    record = json.loads((small_run / "speed.json").read_text())
    measured = report.timings(record)
    assert len(measured) == 4  # two cases, two types
    for by_contender in measured.values():
        assert set(by_contender) == {OURS, "naive PyTorch", "F.linear_cross_entropy", FLOOR}
        assert all(seconds > 0 for each in by_contender.values() for seconds in each.seconds)
    info = record["machine_info"]
    assert info["threads"] == torch.get_num_threads()
    assert info["versions"]["torch"] == torch.__version__
    assert "node" not in info


def test_plots_and_page_of_a_run(small_run: Path) -> None:
    for name in ("speed.png", "accuracy.png"):
        assert (small_run / name).read_bytes().startswith(b"\x89PNG")
    page = (small_run / "page.md").read_text()
    record = json.loads((small_run / "speed.json").read_text())
    ours = next(entry for entry in record["benchmarks"] if entry["extra_info"]["contender"] == OURS)
    assert report._ms(report.Timing(tuple(ours["stats"]["data"])).median) in page
    assert "float64" in page or "Accuracy" in page


def test_every_contender_has_a_row_of_the_overview(small_run: Path) -> None:
    speed = json.loads((small_run / "speed.json").read_text())
    about = {"sweep": "peak", "case": "step", "dtype": "float32", "tokens": 96}
    memory = {"rows": [about | {"contender": OURS, "peak_mib": 3.0}, about | {"contender": "TRL", "failed": "why"}]}
    table = report.overview(speed, memory)
    assert table.columns == ["", "step, float32", "step, bfloat16", "peak, float32"]
    assert "96 tokens" in table.title
    assert [row[0] for row in table.rows] == [OURS, "naive PyTorch", "F.linear_cross_entropy", FLOOR]  # TRL: no figure
    assert table.rows[0][1:] == ["1.00 ×", "1.00 ×", "3 MiB"]
    measured = report.timings(speed)[next(p for p, info in report.points(speed).items() if info["case"] == "step")]
    assert table.rows[1][1] == f"{measured['naive PyTorch'].median / measured[OURS].median:.2f} ×"
    assert table.rows[1][3] == "–"


def _slower(record: dict[str, Any], contender: str, factor: float) -> dict[str, Any]:
    changed = json.loads(json.dumps(record))
    for entry in changed["benchmarks"]:
        if contender in ("", entry["extra_info"]["contender"]):
            entry["stats"]["data"] = [factor * seconds for seconds in entry["stats"]["data"]]
    return changed


def _steady(record: dict[str, Any]) -> dict[str, Any]:
    """The record without noise."""
    changed = json.loads(json.dumps(record))
    for entry in changed["benchmarks"]:
        entry["stats"]["data"] = [entry["stats"]["median"]] * 3
    return changed


def test_a_comparison_tells_by_the_ratio_to_the_floor(small_run: Path, tmp_path: Path) -> None:
    record = _steady(json.loads((small_run / "speed.json").read_text()))
    files = {}
    for name, changed in {
        "old": record,
        "machine twice as slow": _slower(record, "", 2.0),
        "ours slower": _slower(record, OURS, 1.2),
        "a little slower": _slower(record, OURS, 1.05),
        "peer slower": _slower(record, "naive PyTorch", 3.0),
    }.items():
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(json.dumps(changed))

    def code(new: str) -> int:
        return main(["--compare", str(files["old"]), str(files[new])])

    assert code("machine twice as slow") == 0
    assert code("a little slower") == 0
    assert code("peer slower") == 0
    assert code("ours slower") == 1
    regressions = [c for c in compare.compare(files["old"], files["ours slower"]) if c.is_regression]
    assert {c.contender for c in regressions} == {OURS}
    assert all(c.growth == pytest.approx(0.2) for c in regressions)


def test_noise_is_no_regression(small_run: Path, tmp_path: Path) -> None:
    record = _steady(json.loads((small_run / "speed.json").read_text()))
    noisy = _slower(record, OURS, 1.2)
    for entry in noisy["benchmarks"]:
        median = entry["stats"]["data"][0]
        entry["stats"]["data"] = [0.6 * median, median, 1.4 * median]
    (tmp_path / "old.json").write_text(json.dumps(record))
    (tmp_path / "new.json").write_text(json.dumps(noisy))
    assert not any(c.is_regression for c in compare.compare(tmp_path / "old.json", tmp_path / "new.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "nobody"], "--peers: 'nobody' is none of infopo_kernels, naive PyTorch"),
        (["--shapes", "GPT-7"], "--shapes: 'GPT-7'"),
        (["--dtype", "int8"], "--dtypes: 'int8'"),
        (["--compare", "no.json", "none.json"], "no.json"),
        (["--show", "nowhere"], "nowhere holds no record"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "no CUDA device")]),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_every_machine_runs_the_sizes_that_fit() -> None:
    for name, shape in SHAPES.items():
        tokens = shape.tokens_for(60.0)
        assert tokens & (tokens - 1) == 0
        assert tokens == 64 or 2 * tokens * shape.vocab * shape.hidden <= 60e9, name


def test_gradients_are_dropped_between_runs() -> None:
    batch = small(CASES["step"])
    run(Naive(), batch)
    first = batch.weight.grad
    run(Naive(), batch)
    assert batch.weight.grad is not first
    torch.testing.assert_close(batch.weight.grad, first)


def test_the_page_is_that_of_the_records() -> None:
    """docs/benchmarks.md is generated from benchmarks/results/, never edited."""
    page = RESULTS.parents[1] / "docs" / "benchmarks.md"
    if not page.exists():
        pytest.skip("no record of this suite has been committed yet, so there is no page")
    assert page.read_text() == report.markdown(report.load(RESULTS)), (
        "out of date: python -m infopo_kernels bench --show benchmarks/results --docs docs/benchmarks.md"
    )
