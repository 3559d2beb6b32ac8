"""A machine with a GPU may have no pandas, matplotlib and rich: it measures, writes records and prints Markdown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
HIDDEN = """\
import sys

for name in ("pandas", "matplotlib", "rich"):
    sys.modules[name] = None
"""
CODE = """\
import sys
from pathlib import Path

from benchmarks import records, report
from benchmarks.__main__ import main
from benchmarks.gpu import gpu_kernels

row = {"work": "one", "seconds": [2.0, 2.0], "bare_seconds": [1.0, 1.0], "bare_rows": 8, "model": "-", "mib_beyond": 1}
records.save(Path(sys.argv[1]), "gpu-kernels", {"processor": "gpu"}, [row], shape=[8, 4, 2])
print(report.markdown(gpu_kernels.table([row], (8, 4, 2))))
try:
    records.load(Path(sys.argv[1]) / "gpu")
except ModuleNotFoundError as error:
    print(error)
sys.exit(main(["first-contact", "--dry-run"]))
"""


def test_first_contact_and_records(tmp_path: Path) -> None:
    """Hidden from the processes that first contact starts, too."""
    (tmp_path / "sitecustomize.py").write_text(HIDDEN)
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| one | 2000.00 |" in done.stdout
    assert "import of pandas halted" in done.stdout, "it was there after all"
    assert "variants  " in done.stdout, "the list of sections"
    rows = json.loads((tmp_path / "gpu" / "gpu-kernels.json").read_text())["rows"]
    assert rows[0]["bare_rows"] == 8
