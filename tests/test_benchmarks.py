"""The benchmark suite: right values of every contender, fair timing, records, comparison, plots and the page."""

from __future__ import annotations

import ast
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("pytest_benchmark")

pytest.importorskip("pandas")

from benchmarks import __main__ as commands
from benchmarks import compare, pages, plots, records, report
from benchmarks.__main__ import main
from benchmarks.cases import CASES, DTYPES, MAIN_SHAPE, SHAPES, Batch, Case, Shape, make_batch
from benchmarks.contenders import CONTENDERS, FLOOR, OURS, Contender, Naive, floor
from benchmarks.measure import timing
from benchmarks.measure.environment import environment
from benchmarks.measure.fresh import in_fresh_process
from benchmarks.parts import memory, speed, training
from benchmarks.plan import SpeedPoint, default_plan
from benchmarks.truth import check, run, truth
from infopo_kernels import naive
from infopo_kernels.objectives import InfoPOOptions

CPU = torch.device("cpu")
SMALL = Shape("small", 48, 301)
PEERS = ["naive PyTorch", *(["F.linear_cross_entropy"] if hasattr(torch.nn, "LinearCrossEntropyOptions") else [])]
"""Of a small run, where torch has them: the second came with torch 2.13."""


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def small(case: Case, dtype: torch.dtype = torch.float32) -> Batch:
    return make_batch(case, SMALL, 2, 12, dtype, CPU)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_the_truth_is_the_reference(case: Case) -> None:
    """The values that contenders are checked against equal autograd through materialised logits in float64."""
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
    times = timing.interleave(calls, 4, 0.5, CPU)
    # All but a exceed their half second after one repetition. b has three within PATIENCE, c two, d the minimum.
    assert order == ["a", "b", "c", "d", "b", "c", "a", "a", "b"]
    assert times == {"a": [0.25] * 3, "b": [0.75] * 3, "c": [1.0] * 2, "d": [9.0]}
    assert timing.interleave({"a": call("a", 0.1)}, 4, 0.5, CPU) == {"a": [pytest.approx(0.1)] * 4}
    assert timing.interleave({}, 4, 5.0, CPU) == {}  # none of them can run


def test_a_failure_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, batch: Batch) -> torch.Tensor:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(type(CONTENDERS["TRL"]), "loss", broken)
    monkeypatch.setattr(type(CONTENDERS["TRL"]), "unsupported_reason", lambda *_: None)
    monkeypatch.setitem(SHAPES, "small", SMALL)
    plan = replace(default_plan(), peers=(OURS, "TRL"), rounds=2)
    measured = speed.measure(SpeedPoint("small", "step", "float32", 2, 12), plan)
    assert measured.skipped == {"TRL": "RuntimeError: no such kernel"}
    assert set(measured.seconds) == {OURS, FLOOR}
    assert all(len(each) == 2 for each in measured.seconds.values())
    huge = Shape("huge", 1 << 20, 1 << 24)
    monkeypatch.setitem(SHAPES, "huge", huge)
    assert "GiB" in speed.measure(SpeedPoint("huge", "step", "float32", 2, 12), plan).skipped[OURS]


def _setup(contender: str) -> memory.Setup:
    return memory.Setup(contender, Shape("wide", 16, 32768), "float32", 1, 1024, "cpu", threads=1)


def test_memory_in_a_fresh_process() -> None:
    """The measurement sees naive logits (at least two copies of 256 MiB), and reports a limit as a failure."""
    naive = memory.measure_step(_setup("naive PyTorch"), 4.0)
    assert 500 < naive["peak_mib"] < 1100
    assert "out of memory (limit 0.3 GiB)" in memory.measure_step(_setup("naive PyTorch"), 0.3)["failed"]
    assert memory.measure_step(_setup(OURS), 4.0)["peak_mib"] < 64


def _die(argument: Any) -> None:
    os._exit(7)


def _sleep(argument: Any) -> None:
    time.sleep(60)


def _variable(name: str) -> str | None:
    return os.environ.get(name)


def test_a_process_that_dies_or_hangs_is_a_row() -> None:
    assert "7" in in_fresh_process(_die, None, timeout=30.0)["failed"]
    assert "longer" in in_fresh_process(_sleep, None, timeout=0.5)["failed"]


def test_a_fresh_process_has_the_environment_that_it_was_given() -> None:
    name = "INFOPO_KERNELS_A_VARIABLE"
    assert in_fresh_process(_variable, name, environment={name: "here"}) == "here"
    assert name not in os.environ


def test_training_steps_take_turns_on_one_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    small_model = {**training._CONFIG, "hidden_size": 18, "num_hidden_layers": 1, "vocab_size": 301}
    monkeypatch.setattr(training, "_CONFIG", small_model)
    monkeypatch.setattr(training, "keep_what_is_freed", lambda: None)
    monkeypatch.setattr(training, "in_fresh_process", lambda function, argument, *_, **__: function(argument))
    calls = []

    def failing_second(self: Any, batch: Batch) -> torch.Tensor:
        calls.append(batch)
        if len(calls) > 1:
            raise RuntimeError("out of turns")
        return Naive().loss(batch)

    monkeypatch.setattr(type(CONTENDERS["TRL"]), "loss", failing_second)
    monkeypatch.setattr(type(CONTENDERS["TRL"]), "unsupported_reason", lambda *_: None)
    peers = (OURS, "naive PyTorch", "TRL")
    plan = replace(default_plan(quick=True), peers=peers, training_length=12, training_steps=3)
    ours, naive, failed = training.training(plan, lambda text: None)
    assert len(ours["each"]) == len(naive["each"]) == 3
    assert ours["losses"] == pytest.approx(naive["losses"], rel=1e-3)  # two small steps apart
    assert failed["failed"] == "RuntimeError: out of turns"
    record = records.write(tmp_path, "training", environment(), [ours, naive, failed])
    (table,) = report.tables({"training": record})
    assert [row[4] for row in table.rows] == ["3", "3", ""]
    assert table.rows[2][2] == "failed: RuntimeError: out of turns"
    (plot,) = plots.draw({"training": record}, tmp_path)
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run through the command, at sizes that take seconds."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, MAIN_SHAPE, SMALL)
        arguments = [
            "--quick", "--parts", "speed,accuracy", "--peers", "naive,F.linear", "--cases", "step,packed",
            "--dtypes", "float32,bfloat16", "--rounds", "3", "--product-gflop", "0.002", "--output", str(folder),
        ]  # fmt: skip
        assert main(arguments) == 0
    return folder / environment()["processor"]


def content(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "speed.json").read_text())
    return result


def test_the_record_is_of_pytest_benchmark(small_run: Path) -> None:
    rows = records.load(small_run)["speed"].rows
    points = list(report.points(records.load(small_run)["speed"]))
    assert len(points) == 4  # two cases, two types
    for _, by_contender in points:
        assert set(by_contender["seconds"].dropna().index) == {OURS, *PEERS, FLOOR}
    assert (rows["seconds"].dropna() > 0).all()
    info = content(small_run)["machine_info"]
    assert info["threads"] == torch.get_num_threads()
    assert info["versions"]["torch"] == torch.__version__
    assert info["processor"] == small_run.name
    assert "node" not in info


def test_rows_know_the_floor_and_ours_of_their_point(small_run: Path) -> None:
    raw = content(small_run)["benchmarks"]
    rows = records.load(small_run)["speed"].rows
    for column, name in (("floor", FLOOR), ("ours", OURS)):
        for _, row in rows.iterrows():
            point = {key: row[key] for key in ("shape", "case", "dtype", "pairs", "length")}
            (same,) = [entry for entry in raw if entry["extra_info"] == {**point, "contender": name}]
            assert row[column] == same["stats"]["median"]


def test_plots_and_page_of_a_run(small_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("speed.png", "accuracy.png"):
        assert (small_run / name).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(SHAPES, MAIN_SHAPE, SMALL)
    page = pages.benchmarks_page(records.load_all(small_run.parent))
    ours = next(e for e in content(small_run)["benchmarks"] if e["extra_info"]["contender"] == OURS)
    assert f"**{report.milliseconds(ours['stats']['median'])}**" in page
    assert f"# On {small_run.name}" in page
    assert "## Accuracy" in page


def test_every_contender_has_a_row_of_the_overview(small_run: Path, tmp_path: Path) -> None:
    found = records.load(small_run)
    about = {"sweep": "peak", "case": "step", "dtype": "float32", "tokens": 96}
    peaks = [about | {"contender": OURS, "peak_mib": 3.0}, about | {"contender": "TRL", "failed": "why"}]
    steps = [
        {"contender": name, "dtype": "float32", "sequences": 4, "length": 8, "seconds": seconds}
        for name, seconds in ((OURS, 2.0), ("naive PyTorch", 1.5))
    ]
    machine = environment()
    found["memory"] = records.write(tmp_path, "memory", machine, peaks)
    found["training"] = records.write(tmp_path, "training", machine, steps)
    table = report.overview(found)
    assert table.columns == ["", "step, float32", "step, bfloat16", "peak, float32", "training step, float32"]
    assert "96 tokens" in table.title
    assert "32 tokens" in table.title
    assert [row[0] for row in table.rows] == [OURS, *PEERS, FLOOR]  # TRL: no figure
    assert table.rows[0][1:] == ["1.00 ×", "1.00 ×", "3 MiB", "1.00 ×"]
    medians = {
        entry["extra_info"]["contender"]: entry["stats"]["median"]
        for entry in content(small_run)["benchmarks"]
        if (entry["extra_info"]["case"], entry["extra_info"]["dtype"]) == ("step", "float32")
    }
    naive = f"{medians['naive PyTorch'] / medians[OURS]:.2f} ×"
    assert [table.rows[1][1], *table.rows[1][3:]] == [naive, "–", "0.75 ×"], "also where this library loses"


def test_processors_lie_side_by_side(tmp_path: Path) -> None:
    """A run on another processor does not change the records of the first, and a page shows both."""
    row = {"layout": "padded", "tokens": 3, "seconds": [1.0, 2.0]}
    for processor in ("intel-1-2-3", "amd-4-5-6"):
        machine = {**environment(), "processor": processor, "cpu": processor}
        records.write(tmp_path, "packing", machine, [row], pairs=2)
    found = records.load_all(tmp_path)
    assert set(found) == {"intel-1-2-3", "amd-4-5-6"}
    page = pages.filled("before\n<!-- packing: begin -->\nold\n<!-- packing: end -->\nafter", found)
    assert page.startswith("before\n<!-- packing: begin -->\n2 pairs")
    assert page.endswith("<!-- packing: end -->\nafter")
    assert "amd-4-5-6" in page
    assert "intel-1-2-3" in page
    assert "old" not in page


def test_pieces_of_a_part_are_one_record_of_one_machine(tmp_path: Path) -> None:
    for number, machine in (("1", {"cpu": "a"}), ("2", {"cpu": "a"})):
        (tmp_path / f"memory-{number}.json").write_text(json.dumps({"machine_info": machine, "rows": [{"x": number}]}))
    assert list(records.load(tmp_path)["memory"].rows["x"]) == ["1", "2"]
    (tmp_path / "memory-3.json").write_text(json.dumps({"machine_info": {"cpu": "b"}, "rows": []}))
    with pytest.raises(ValueError, match="different machines"):
        records.load(tmp_path)


def _slower(record: dict[str, Any], contender: str, factor: float) -> dict[str, Any]:
    changed: dict[str, Any] = json.loads(json.dumps(record))
    for entry in changed["benchmarks"]:
        if contender in ("", entry["extra_info"]["contender"]):
            entry["stats"]["data"] = [factor * seconds for seconds in entry["stats"]["data"]]
    return changed


def _steady(record: dict[str, Any]) -> dict[str, Any]:
    """The record without noise."""
    for entry in record["benchmarks"]:
        entry["stats"]["data"] = [entry["stats"]["median"]] * 3
    return record


def test_a_comparison_tells_by_the_ratio_to_the_floor(small_run: Path, tmp_path: Path) -> None:
    record = _steady(content(small_run))
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
        return main(["compare", str(files["old"]), str(files[new])])

    assert code("machine twice as slow") == 0
    assert code("a little slower") == 0
    assert code("peer slower") == 0
    assert code("ours slower") == 1
    changes = compare.compare(files["old"], files["ours slower"])
    slower = compare.regressions(changes)
    assert len(slower) == 4
    assert compare.regressions(changes, "naive PyTorch").empty
    assert list(slower["growth"]) == pytest.approx([0.2] * 4)


def test_noise_is_no_regression(small_run: Path, tmp_path: Path) -> None:
    record = _steady(content(small_run))
    (tmp_path / "old.json").write_text(json.dumps(record))
    noisy = _slower(record, OURS, 1.2)
    for entry in noisy["benchmarks"]:
        median = entry["stats"]["data"][0]
        entry["stats"]["data"] = [0.6 * median, median, 1.4 * median]
    (tmp_path / "new.json").write_text(json.dumps(noisy))
    assert compare.regressions(compare.compare(tmp_path / "old.json", tmp_path / "new.json")).empty


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "nobody"], "--peers: 'nobody' is not one of infopo_kernels, naive PyTorch"),
        (["--shapes", "GPT-7"], "--shapes: 'GPT-7'"),
        (["--dtype", "int8"], "--dtypes: 'int8'"),
        (["compare", "no.json", "none.json"], "no.json"),
        (["show", "nowhere"], "nowhere has no record"),
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


def test_the_pages_are_those_of_the_records() -> None:
    """Figures in the README and docs/ are generated from benchmarks/results/, never edited."""
    for page, text in pages.pages().items():
        assert page.read_text() == text, f"{page.name} is out of date: {pages.COMMAND}"


def test_every_block_of_a_page_is_generated() -> None:
    """Every record of figures is on a page."""
    names = [name for page in pages.pages() for name in re.findall(r"<!-- ([\w-]+): begin -->", page.read_text())]
    assert sorted(names) == sorted(pages._BLOCKS)


def test_every_command_has_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    for name, (module, _) in commands._COMMANDS.items():
        assert name in text
        if module.startswith("benchmarks.gpu"):
            pytest.importorskip("triton")
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
    assert "--product-gflop" in text


# A module may not import one of a higher level. The longest prefix of its name in this table gives its level.
LEVELS = {
    "cases": 0,
    "measure": 0,
    "contenders": 1,
    "truth": 2,
    "plan": 2,
    "records": 2,
    "style": 2,
    "parts": 3,
    "targets": 3,
    "report": 4,
    "plots": 4,
    "compare": 5,
    "parts.cpu_targets": 5,
    "parts.long_context_training": 5,
    "parts.distributed": 5,
    "parts.packing": 5,
    "parts.real_text": 5,
    "parts.tail_training": 5,
    "parts.tuning_sweep": 5,
    "gpu": 5,
    "pages": 6,
    "test_speed": 6,
    "conftest": 6,
    "__main__": 7,
}


def test_imports_of_benchmarks_run_one_way() -> None:
    """The package does not import the benchmarks, because they are not installed with it."""

    def imported(path: Path) -> set[str]:
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        return {name.removeprefix("benchmarks.") for name in found if name.startswith("benchmarks.")}

    def level(module: str) -> int | None:
        names = [name for name in LEVELS if module == name or module.startswith(name + ".")]
        return LEVELS[max(names, key=len)] if names else None

    folder = Path(pages.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        module = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        if not module:
            continue
        own = level(module)
        assert own is not None, f"{module} has no level"
        for name in imported(path):
            other = level(name)
            assert other is None or other <= own, f"{module} (level {own}) imports {name} (level {other})"
    for path in sorted((folder.parent / "infopo_kernels").rglob("*.py")):
        assert not imported(path), path
