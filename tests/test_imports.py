"""Imports run one way, and importing the package needs torch only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "infopo_kernels"

# Lower may not import higher. A module counts at the level of the longest prefix that names it.
LEVELS = {
    "options": 0,
    "op_schema": 0,
    "packing": 1,
    "objectives.base": 2,
    "objectives": 3,
    "output": 3,
    "checks": 4,
    "naive": 4,
    "backends.base": 4,
    "backends": 5,
    "backends.dispatch": 6,
    "schedule": 6,
    "ops": 7,
    "functional": 8,
    "modules": 9,
    "integrations": 10,
    "training": 10,
    "cli": 12,
}


def level(module: str) -> int | None:
    """Level of `infopo_kernels.<module>`, None for the package itself and what lies outside the order."""
    names = [name for name in LEVELS if module == name or module.startswith(name + ".")]
    return LEVELS[max(names, key=len)] if names else None


def imported(path: Path) -> list[str]:
    """Modules of the package that a file imports, without the package's name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name.removeprefix("infopo_kernels.") for name in found if name.startswith("infopo_kernels.")]


def module_name(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if level(module_name(path)) is not None]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_run_one_way(path: Path) -> None:
    own = level(module_name(path))
    assert own is not None
    for module in imported(path):
        other = level(module)
        assert other is None or other <= own, f"{path.name} (level {own}) imports {module} (level {other})"


def test_importing_the_package_needs_torch_only() -> None:
    """In a fresh process none of the optional packages, nor any integration, comes along."""
    code = (
        "import sys, infopo_kernels\n"
        "bad = {'triton', 'transformers', 'trl', 'peft', 'datasets', 'accelerate', 'rich'} & set(sys.modules)\n"
        "bad |= {m for m in sys.modules if m.startswith(('infopo_kernels.integrations', 'infopo_kernels.training'))}\n"
        "sys.exit(f'imported too: {sorted(bad)}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert done.returncode == 0, done.stderr
