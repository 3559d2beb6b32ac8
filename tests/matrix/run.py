"""`make test-matrix`: the tests that depend on other libraries, at both ends of the releases that are claimed.

For each environment of cells.toml: a virtual environment in `.venvs/matrix/NAME` (kept between runs; pip's own cache
serves the second machine's worth of downloads), the one wheel that is built first, and pytest in a copy of the tree
without the package's sources, so that what is tested is what was installed. The table goes to standard output, and with
--record to benchmarks/results/matrix.md, which the documentation shows.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomllib
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
HOME = ROOT / ".venvs" / "matrix"
RECORD = ROOT / "benchmarks" / "results" / "matrix.md"
CELLS = tomllib.loads((Path(__file__).parent / "cells.toml").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SHOWN = ("torch", "triton", "transformers", "trl", "peft", "accelerate", "datasets")
TOOLS = ("pytest", "hypothesis", "numpy", "setuptools>=77", "packaging")
SECONDS = 3600
"""A group of tests that takes longer hangs."""


@dataclass
class Outcome:
    """What one environment was and what its tests said."""

    name: str
    python: str
    versions: dict[str, str] = field(default_factory=dict)
    tests: dict[str, str] = field(default_factory=dict)
    failed: bool = False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", help="environments to run (default: all but `cheap`)")
    parser.add_argument("--list", action="store_true", help="say what would be installed and run, and do nothing")
    parser.add_argument("--record", action="store_true", help=f"write the table to {RECORD.relative_to(ROOT)}")
    arguments = parser.parse_args()
    names = arguments.cells or [name for name in CELLS["cells"] if name != "cheap"]
    if unknown := [name for name in names if name not in CELLS["cells"]]:
        parser.error(f"no such environment: {', '.join(unknown)}; there are {', '.join(CELLS['cells'])}")
    if arguments.list:
        for name in names:
            cell = CELLS["cells"][name]
            print(f"{name}: Python {cell['python']}; {' '.join(packages(cell))}; tests: {' '.join(cell['tests'])}")
        return 0
    tree = copy_of_the_tree()
    outcomes = [run(name, tree) for name in names]
    print("\n" + table(outcomes))
    if arguments.record:
        RECORD.write_text(table(outcomes))
    return int(any(outcome.failed for outcome in outcomes))


def packages(cell: dict[str, Any]) -> list[str]:
    """What pip is asked for beside the wheel."""
    named = {"python_version": cell["python"]}
    lines = [line for extra in cell["extras"] for line in PROJECT["optional-dependencies"][extra]]
    asked = [each for each in map(Requirement, lines) if each.marker is None or each.marker.evaluate(named)]
    lines = [f"{each.name}{each.specifier}" for each in asked]
    if cell["libraries"] == "oldest":
        lines = [floor(line) for line in lines]
    torch = {"oldest": floor(PROJECT["dependencies"][0]), "newest": PROJECT["dependencies"][0]}
    return sorted({torch.get(cell["torch"], f"torch=={cell['torch']}"), *lines, *TOOLS})


def floor(line: str) -> str:
    """The lowest release that a requirement admits: "peft>=0.18,<1" gives "peft==0.18"."""
    requirement = Requirement(line)
    lowest = next(each.version for each in requirement.specifier if each.operator == ">=")
    return f"{requirement.name}=={lowest}"


def interpreter(version: str) -> Path | None:
    """Python of that version: on the path, or under pyenv."""
    candidates = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    for candidate in candidates:
        if candidate is None:
            continue
        asked = [str(candidate), "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        if done.stdout.strip() == version:
            return Path(candidate)
    return None


def copy_of_the_tree() -> Path:
    """What is tracked, its wheel in `wheels/`, and then no package: what pytest imports is what was installed."""
    tree = HOME / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    for name in (each.decode() for each in tracked if each):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    for skip in (0, 1):
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
        environment = {**os.environ, "INFOPO_KERNELS_SKIP_EXTENSION": str(skip)}
        shutil.rmtree(tree / "build", ignore_errors=True)
        wheels = tree / "wheels" / ("without" if skip else "with")
        subprocess.run([*command, "--wheel-dir", wheels], cwd=tree, env=environment, check=True)
    shutil.rmtree(tree / "infopo_kernels")
    return tree


def run(name: str, tree: Path) -> Outcome:
    """Set up one environment and run its tests."""
    cell = CELLS["cells"][name]
    outcome = Outcome(name, cell["python"])
    python = interpreter(cell["python"])
    if python is None:
        outcome.tests["all"] = f"not run: no Python {cell['python']} on this machine"
        return outcome
    place = HOME / name
    own = place / "bin" / "python"
    print(f"\n== {name}: Python {cell['python']}, {' '.join(packages(cell))}", flush=True)
    if not own.exists():
        subprocess.run([python, "-m", "venv", place], check=True)
    pip = [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    extra = os.environ.get("TORCH_PIP_ARGS", "").split()
    wheel = next((tree / "wheels" / ("with" if cell["extension"] else "without")).glob("*.whl"))
    newer = ["--upgrade"] if "newest" in (cell["torch"], cell["libraries"]) else []  # of an environment from before
    for words in ([*pip, *extra, *newer, *packages(cell)], [*pip, "--no-deps", "--force-reinstall", wheel]):
        if subprocess.run(words, check=False).returncode:
            outcome.tests["all"], outcome.failed = "FAILED: pip could not install it", True
            return outcome
    freeze = subprocess.run([own, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True)
    installed = dict(line.split("==") for line in freeze.stdout.split() if "==" in line)
    outcome.versions = {library: installed.get(library, "–") for library in SHOWN}
    outcome.python = subprocess.run([own, "-V"], capture_output=True, text=True, check=True).stdout.split()[1]
    for group in cell["tests"]:
        began = time.monotonic()
        outcome.tests[group] = tested(own, tree, CELLS["groups"][group])
        outcome.failed |= outcome.tests[group].startswith("FAILED")
        print(f"{name}, {group}: {outcome.tests[group]}, {time.monotonic() - began:.0f} s", flush=True)
    return outcome


def tested(python: Path, tree: Path, arguments: list[str]) -> str:
    """pytest's last line in short; its output where a test failed."""
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"FAILED: no end after {SECONDS} s"
    if done.returncode:
        print(done.stdout[-8000:] + done.stderr[-2000:], flush=True)
        counts = re.findall(r"\d+ (?:failed|passed|errors?)", done.stdout.splitlines()[-1] if done.stdout else "")
        return f"FAILED: {', '.join(counts) or 'no tests were run'}"
    return ", ".join(re.findall(r"\d+ (?:passed|skipped)", done.stdout.splitlines()[-1]))


def table(outcomes: list[Outcome]) -> str:
    """Markdown: an environment a row."""
    lines = [f"| | Python | {' | '.join(SHOWN)} | tests |", f"| --- | --- | {'--- | ' * len(SHOWN)}--- |"]
    for outcome in outcomes:
        versions = " | ".join(outcome.versions.get(library, "") for library in SHOWN)
        tests = "<br>".join(f"{group}: {said}" for group, said in outcome.tests.items())
        lines.append(f"| {outcome.name} | {outcome.python} | {versions} | {tests} |")
    return "\n".join(lines) + f"\n\nRun on {time.strftime('%Y-%m-%d')}, {platform.machine()}, {platform.system()}.\n"


if __name__ == "__main__":
    sys.exit(main())
