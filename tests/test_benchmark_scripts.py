"""The scripts of benchmarks/ whose figures stand in docs/: limits that bite, tables that are those of the records."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS, GUIDE = ROOT / "benchmarks" / "results", ROOT / "docs" / "tuning_guide.md"

for needed in ("transformers", "rich"):
    pytest.importorskip(needed)


def script(name: str) -> Any:
    specification = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
@pytest.mark.parametrize("way", ["fused", "naive"])
def test_naive_logits_fail_under_a_limit_that_the_fused_head_keeps(way: str) -> None:
    limit = 200  # MiB; the logits of 2048 tokens are 128, and naive log-probabilities need several of that size
    sizes = ["--hidden", "64", "--layers", "1", "--vocabulary", "16384", "--memory-gib", str(limit / 1024)]
    command = [sys.executable, str(ROOT / "benchmarks" / "long_context_training.py"), "--case", "2048", "--way", way]
    # What is held counts address space; another thread's arena reserves 64 MiB of it that the limit does not count.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [*command, *sizes, "--device", "cpu"], capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    if way == "fused":
        assert row["peak_mib"] < limit
        return
    assert "allocate" in row["failed"]
    assert row["asked_mib"] == pytest.approx(128, rel=0.01)
    assert row["held_mib"] < limit < row["held_mib"] + row["asked_mib"]


@pytest.mark.parametrize("record", ["tuning_sweep", "tuning_sweep_long"])
def test_the_guides_tables_are_those_of_the_records(record: str, tmp_path: Path) -> None:
    sweep, copy = script("tuning_sweep"), tmp_path / "guide.md"
    text = GUIDE.read_text()
    begin, end = f"<!-- {record}: begin -->", f"<!-- {record}: end -->"
    copy.write_text(text.split(begin)[0] + begin + end + text.split(end)[1])
    sweep.write_guide(json.loads((RESULTS / f"{record}.json").read_text()), copy, record)
    assert copy.read_text() == text, f"out of date: {sweep.__doc__}"


def test_a_part_of_the_long_context_record_keeps_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, output = script("long_context_training"), tmp_path / "record.json"

    def measured(way: str, tokens: int, args: Any) -> dict[str, Any]:
        row: dict[str, Any] = {"way": way, "tokens": tokens, "seconds": 1.0}
        failed = way == "naive" and tokens > 8192
        return row | ({"failed": "no", "held_mib": 1.0, "asked_mib": 2.0} if failed else {"peak_mib": tokens / 16})

    monkeypatch.setattr(module, "measure", measured)
    for words in (["--tokens", "32768", "--ways", "naive"], ["--tokens", "32768", "8192", "--ways", "fused"]):
        monkeypatch.setattr(sys, "argv", ["script", *words, "--device", "cpu", "--output", str(output)])
        module.main()
    rows = [(row["tokens"], row["way"]) for row in json.loads(output.read_text())["rows"]]
    assert rows == [(8192, "fused"), (32768, "fused"), (32768, "naive")]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "held 1 MiB, asked for 2 more" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["script", "--tokens", "8192", "--hidden", "64", "--output", str(output)])
    module.main()
    assert len(json.loads(output.read_text())["rows"]) == 2, "another shape begins another record"
