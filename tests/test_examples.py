"""The examples, and imports that happen only when they are needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.training_fixtures import save_tiny_model

ROOT = Path(__file__).parents[1]


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)


def test_without_trl_and_transformers_the_package_works_and_says_how_to_install() -> None:
    code = """
import sys
for name in ("trl", "transformers"):
    sys.modules[name] = None
import infopo_kernels, infopo_kernels.integrations
assert not any(name.startswith("infopo_kernels.integrations.") for name in sys.modules)
for module, extra in (("trl", "train"), ("transformers", "train"), ("trainer", "train")):
    try:
        __import__(f"infopo_kernels.integrations.{module}")
    except ImportError as error:
        assert "pip install 'infopo_kernels[" in str(error), error
    else:
        raise AssertionError(module)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    without_trl = run_python("import sys; sys.modules['trl'] = None; import infopo_kernels.integrations.trl")
    assert "pip install 'infopo_kernels[trl]'" in without_trl.stderr


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("other_losses.py", ["--loss", "orpo", "--steps", "2"]),
        ("train_transformers.py", ["--steps", "2"]),
        ("train_trl.py", ["--steps", "2", "--lora-rank", "4"]),
    ],
)
def test_examples_run(script: str, arguments: list[str], tmp_path: Path) -> None:
    if script == "train_trl.py":
        pytest.importorskip("trl")
    model = save_tiny_model(tmp_path / "model", initializer_range=0.05)
    options = [] if script == "other_losses.py" else ["--output", str(tmp_path / "out")]
    code = f"import runpy; runpy.run_path('examples/{script}', run_name='__main__')"
    done = run_python(code, "--model", str(model), *options, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    if options:
        saved = {path.name for path in (tmp_path / "out").iterdir()}
        assert saved & {"model.safetensors", "adapter_model.safetensors"}
