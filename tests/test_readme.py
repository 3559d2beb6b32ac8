"""The README is correct: snippets run, links and targets exist (tests/test_benchmarks.py checks the figures)."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infopo_kernels.commands.demo.word_problems import word_problems
from infopo_kernels.integrations.collators import PreferenceCollator, preference_features
from tests.training_fixtures import byte_tokenizer, save_tiny_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.filterwarnings("ignore")
def test_snippets_run_in_order(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each snippet as it stands, with a tiny model where it says `model`; the one with TRL on a CPU."""
    datasets = pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("trl")
    start = save_tiny_model(tmp_path / "start", initializer_range=0.02)
    monkeypatch.chdir(tmp_path)
    tokenizer, rows = byte_tokenizer(), [pair.row() for pair in word_problems(4, seed=0)]
    collated = PreferenceCollator()(preference_features(tokenizer, rows))
    names: dict[str, Any] = {
        "tokenizer": tokenizer,
        "dataset": datasets.Dataset.from_list(rows),
        "batch": {key: collated[key] for key in ("input_ids", "attention_mask", "labels")},
    }
    snippets = re.findall(r"^```python\n(.*?)^```", README, flags=re.M | re.S)
    assert len(snippets) == 3
    for snippet in snippets:
        names["model"] = transformers.AutoModelForCausalLM.from_pretrained(start)
        before = names["model"].lm_head.weight.detach().clone()
        exec(compile(snippet.replace('Config("out",', 'Config("out", use_cpu=True,'), "README.md", "exec"), names)
        if "trainer" in snippet:
            assert not names["model"].lm_head.weight.equal(before)
        if "attach" in snippet:
            assert names["out"].loss.item() == pytest.approx(math.exp(-1), rel=1e-5)
            assert names["model"].lm_head.weight.grad.isfinite().all()
    assert "tensor(" in capsys.readouterr().out


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
