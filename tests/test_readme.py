"""The README is true: its snippets run, its figures are those of the record, its links and targets exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_snippets_run_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    snippets = re.findall(r"^```python\n(.*?)^```", README, flags=re.M | re.S)
    assert len(snippets) >= 2
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    assert "tensor(" in capsys.readouterr().out
    assert names["dpo"].isfinite()  # type: ignore[attr-defined]


def test_figures_are_those_of_the_record() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/doc_tables.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_named_targets_and_commands_exist() -> None:
    targets = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, flags=re.M))
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert targets <= rules
    for command in set(re.findall(r"python -m infopo_kernels ([a-z-]+)", README)):
        done = subprocess.run(
            [sys.executable, "-m", "infopo_kernels", command, "--help"],
            capture_output=True, text=True, cwd=ROOT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    for script in set(re.findall(r"python (benchmarks/\S+\.py)", README)):
        assert (ROOT / script).exists(), script
