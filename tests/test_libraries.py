"""What is said where a library is missing, broken, or of a release that nobody tested; and that the claims agree."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from infopo_kernels import libraries
from infopo_kernels.libraries import TESTED, import_failure, warn_untested

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "_said", set())


def install(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)


@pytest.mark.parametrize("library", ["transformers", "trl", "peft"])
@pytest.mark.parametrize("version", ["0.1", "99.0.0", "99.0.0.dev0"])
def test_a_release_outside_the_range_is_said_once(monkeypatch: pytest.MonkeyPatch, library: str, version: str) -> None:
    install(monkeypatch, version)
    with pytest.warns(UserWarning, match=rf"{library} {version} is installed.* {TESTED[library][1]}"):
        warn_untested(library)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_untested(library)


@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("library", TESTED)
def test_a_release_inside_the_range_is_not_said(monkeypatch: pytest.MonkeyPatch, library: str, end: int) -> None:
    version = TESTED[library][end]
    for spelling in (version, version + "+cpu", ".".join(version.split(".")[:2]) + ".9"):
        install(monkeypatch, spelling)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_untested(library)


def test_a_library_that_is_not_there_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_untested(*TESTED)


@pytest.mark.parametrize(
    ("library", "module", "owner", "method"),
    [
        ("transformers", "trainer", "transformers.Trainer", "_get_grad_norm"),
        ("trl", "trl", "trl.DPOTrainer", "_precompute_ref_logps"),
    ],
)
def test_an_override_that_nobody_would_call_is_said(library: str, module: str, owner: str, method: str) -> None:
    """Without the method that is overridden, the check in it would never run."""
    pytest.importorskip(library)
    code = f"import {library}\ndel {owner}.{method}\nimport infopo_kernels.integrations.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    oldest, newest = TESTED[library]
    said = done.stderr.strip().splitlines()[-1]
    assert done.returncode
    assert f"has no `{method}`" in said, said
    assert said.endswith(f"Install {library} {oldest} to {newest}."), said


def test_a_missing_package_is_named_with_what_to_run() -> None:
    message = str(import_failure("somewhere", ("torch", "no_such_package"), "train", ImportError("x")))
    assert message == "somewhere needs `no_such_package`; run: pip install 'infopo_kernels[train]'"


def test_a_broken_package_is_blamed_with_its_cause() -> None:
    """The innermost cause, however many layers of lazy imports lie around it."""
    try:
        try:
            try:
                raise AttributeError("pyarrow has no attribute `lib`")
            except AttributeError as inner:
                raise RuntimeError("datasets") from inner
        except RuntimeError:
            raise ImportError("cannot import name `Trainer` from transformers")  # noqa: B904 - as careless code does
    except ImportError as outer:
        message = str(import_failure("somewhere", ("torch",), "train", outer))
    assert "AttributeError: pyarrow has no attribute `lib`" in message
    assert "torch " + importlib.metadata.version("torch") in message


def in_fresh_process(code: str, path: Path) -> str:
    """Standard error of a process that finds the modules in `path` before all others."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode != 0
    return done.stderr


@pytest.mark.parametrize(
    ("module", "broken"), [("trainer", "peft"), ("trl", "pyarrow"), ("transformers", "huggingface_hub")]
)
def test_an_integration_says_which_package_broke(tmp_path: Path, module: str, broken: str) -> None:
    pytest.importorskip("transformers" if module != "trl" else "trl")
    (tmp_path / broken).mkdir()
    (tmp_path / broken / "__init__.py").write_text("raise ImportError('its shared library is gone')\n")
    said = in_fresh_process(f"import infopo_kernels.integrations.{module}", tmp_path).strip().splitlines()[-1]
    assert "its shared library is gone" in said, said


def test_without_torch_the_error_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    said = in_fresh_process("import infopo_kernels", tmp_path)
    assert "ImportError: infopo_kernels needs PyTorch, which is not installed; run: pip install torch" in said


@pytest.mark.parametrize("version", ["99.0.0", None], ids=["newer", "tested"])
def test_torch_and_triton_are_looked_at_where_they_are_imported(version: str | None) -> None:
    pytest.importorskip("triton")
    claimed = {name: version or TESTED[name][1] for name in ("torch", "triton")}
    code = (
        "import importlib.metadata, torch, triton\n"
        f"importlib.metadata.version = {claimed}.__getitem__\n"
        "import infopo_kernels\n"
        "import infopo_kernels.backends.triton.launch\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    for name in claimed:
        assert done.stderr.count(f"{name} 99.0.0 is installed; infopo_kernels was tested") == (version is not None)


def test_an_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "2.6.0")
    with pytest.raises(ImportError, match=r"needs torch 2\.10\.0 or later, found 2\.6\.0"):
        libraries.require_torch()


def test_floors_of_the_package_are_the_oldest_that_were_tested() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for library, (oldest, _) in TESTED.items():
        floors = set(re.findall(rf'"{library}>=([\d.]+)', project))
        assert len(floors) == 1, f"{library} has {len(floors)} different floors in pyproject.toml: {floors}"
        floor = floors.pop()
        assert libraries._numbers(floor) == libraries._numbers(oldest), f"{library}: {floor} asked, {oldest} tested"
