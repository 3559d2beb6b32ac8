"""Imports go in one direction, every module has a level, and importing the package needs torch only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "infopo_kernels"

# A module may not import one of a higher level. The longest prefix of its name in this table gives its level. No module
# is exempt.
LEVELS = {
    "libraries": 0,
    "options": 0,
    "op_schema": 0,
    "packing": 1,
    "objectives.base": 2,
    "objectives": 3,
    "output": 3,
    "checks": 4,
    "naive": 4,
    "backends.base": 4,
    "lift": 5,
    "backends": 5,
    "distributed.collectives": 1,
    "distributed.agreement": 2,
    "distributed": 5,
    "backends.dispatch": 6,
    "schedule": 6,
    "ops": 7,
    "functional": 8,
    "modules": 9,
    "": 10,  # infopo_kernels/__init__.py, what users import from
    "integrations": 11,
    "reference_logps": 12,  # the old name of integrations.references
    "commands": 13,
    "__main__": 14,
}


def module_name(path: Path) -> str:
    """The module name of a file without `infopo_kernels.`; for an `__init__.py` the name of its folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def level(module: str) -> int:
    names = [name for name in LEVELS if module == name or (name and module.startswith(name + "."))]
    assert names, f"infopo_kernels.{module} has no level; give it one in LEVELS"
    return LEVELS[max(names, key=len)]


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    names = {name.removeprefix("infopo_kernels").removeprefix(".") for name in found if is_ours(name)}
    return {longest_module(name) for name in names}


def is_ours(name: str) -> bool:
    return name == "infopo_kernels" or name.startswith("infopo_kernels.")


def longest_module(name: str) -> str:
    """The module part of a name: `functional` for `functional.linear_logps`."""
    while name not in MODULES and not name.startswith("_C") and name:
        name = name.rpartition(".")[0]
    return name


def folder(module: str) -> str:
    return module.split(".")[0] if f"{module.split('.')[0]}" in FOLDERS else ""


FOLDERS = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}


@pytest.mark.parametrize("module", sorted(MODULES), ids=lambda m: m or "infopo_kernels")
def test_imports_run_one_way(module: str) -> None:
    own = level(module)
    for other in imported(MODULES[module]) - {module}:
        if other.startswith("_C"):
            continue
        assert level(other) <= own, f"{module} (level {own}) imports {other} (level {level(other)})"


def test_no_folder_imports_back() -> None:
    """If a folder imports modules of another, these do not import that folder, directly or indirectly."""
    edges: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        for other in imported(path):
            if folder(module) != folder(other) and folder(module) and folder(other):
                edges.setdefault(folder(module), set()).add(folder(other))
    for start in edges:
        reached, todo = set(), [*edges[start]]
        while todo:
            here = todo.pop()
            if here not in reached:
                reached.add(here)
                todo += edges.get(here, ())
        assert start not in reached, f"{start} imports {sorted(edges[start])}, which lead back to it"


def test_no_module_imports_itself_in_a_circle() -> None:
    """Modules of one level may import one another, but must not form a cycle."""
    edges = {module: imported(path) - {module} for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module in done or module not in edges:
            return
        for other in edges[module]:
            # A package's own __init__ exports its modules; that is not a cycle.
            if not module.startswith(other + ".") and other:
                visit(other, (*above, module))
        done.add(module)

    for module in edges:
        visit(module, ())


def test_a_missing_level_is_found() -> None:
    with pytest.raises(AssertionError, match="has no level"):
        level("somewhere.new")


def test_importing_the_package_needs_torch_only() -> None:
    """In a fresh process the import loads no optional package and no integration."""
    code = (
        "import sys, infopo_kernels\n"
        "bad = {'triton', 'transformers', 'trl', 'peft', 'datasets', 'accelerate', 'rich'} & set(sys.modules)\n"
        "above = ('infopo_kernels.integrations', 'infopo_kernels.commands', 'infopo_kernels.naive')\n"
        "bad |= {m for m in sys.modules if m.startswith(above)}\n"
        "sys.exit(f'imported too: {sorted(bad)}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert done.returncode == 0, done.stderr


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()
