"""The README is true: its snippets run, its links and targets exist (its figures: tests/test_benchmarks.py)."""

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


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_named_targets_and_commands_exist() -> None:
    targets = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, flags=re.M))
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert targets <= rules
    for module, command in set(re.findall(r"python -m (infopo_kernels|benchmarks) ([a-z-]+)", README)):
        done = subprocess.run(
            [sys.executable, "-m", module, command, "--help"], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert done.returncode == 0, done.stderr
