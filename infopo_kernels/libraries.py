"""Which releases of other libraries were tested, and what is said where one is missing, broken or outside the range.

pip enforces the floors and ceilings in pyproject.toml. `make test-matrix` runs the tests at both ends of each range
below. A release outside its range is not refused where what is needed is there: a newer one mostly works, and its user
should know that nobody tried.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import warnings
from typing import Final

TESTED: Final = {
    "torch": ("2.10.0", "2.15.0"),
    "triton": ("3.6.0", "3.9.0"),
    "transformers": ("5.6.0", "5.24.0"),
    "trl": ("1.16.0", "1.16.0"),
    "peft": ("0.18.0", "0.21.2"),
    "accelerate": ("1.10.1", "1.15.0"),
    "datasets": ("4.7.0", "5.2.0"),
}
"""Oldest and newest tested release of each library."""

_said: set[str] = set()


def require_torch() -> None:
    """Raise ImportError, with what to install, where torch is missing or older than the oldest that works."""
    try:
        importlib.import_module("torch")
    except ModuleNotFoundError as error:
        if error.name != "torch":  # torch is there, and something that it needs is not
            raise
        raise ImportError(
            "infopo_kernels needs PyTorch, which is not installed; run: pip install torch (PyTorch's pages list the "
            "command for each accelerator). To build the C++ kernels too, install infopo_kernels after it with: "
            "pip install --no-build-isolation infopo_kernels",
            name="torch",
        ) from error
    oldest, installed = TESTED["torch"][0], _installed("torch")
    if installed is not None and _numbers(installed) < _numbers(oldest):
        raise ImportError(
            f"infopo_kernels needs torch {oldest} or later, found {installed}; run: pip install -U torch", name="torch"
        )


def warn_untested(*libraries: str) -> None:
    """Warn, once for each library, if its installed release lies outside the tested range.

    A release of the newest tested series (same first two numbers) counts as tested: such releases mend faults only. A
    library that is not installed is passed over.
    """
    for library in libraries:
        installed = _installed(library)
        if installed is None or library in _said:
            continue
        oldest, newest = TESTED[library]
        if _numbers(installed) >= _numbers(oldest) and _numbers(installed)[:2] <= _numbers(newest)[:2]:
            continue
        _said.add(library)
        warnings.warn(
            f"{library} {installed} is installed; infopo_kernels was tested with {library} {oldest} to {newest}. "
            "Other releases may work; where they do not, install one of those.",
            stacklevel=3,
        )


def require_methods(library: str, owner: type, names: tuple[str, ...]) -> None:
    """Raise ImportError if `owner`, a class of `library`, lacks one of the private methods that are overridden.

    An override that the library's release does not call guards nothing, and says nothing about it.
    """
    if missing := [name for name in names if not hasattr(owner, name)]:
        oldest, newest = TESTED[library]
        raise ImportError(
            f"{owner.__name__} with {library} {_installed(library) or '(no version)'} has no "
            f"{' and no '.join(f'`{name}`' for name in missing)}; infopo_kernels overrides it, and what it adds there "
            f"would never run. Install {library} {oldest} to {newest}.",
            name=library,
        )


def import_failure(module: str, packages: tuple[str, ...], extra: str, error: ImportError) -> ImportError:
    """The ImportError for `module`, which needs `packages`, after `error`: says what is missing, or what is broken.

    Example::

        try:
            from transformers import Trainer
        except ImportError as error:
            raise import_failure(__name__, ("transformers", "accelerate"), "train", error) from error
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(f"`{name}`" for name in missing)
        return ImportError(f"{module} needs {names}; run: pip install 'infopo_kernels[{extra}]'", name=error.name)
    cause: BaseException = error
    while (deeper := cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)) is not None:
        cause = deeper
    installed = ", ".join(f"{name} {_installed(name) or '(no version)'}" for name in packages)
    return ImportError(
        f"{module} needs {installed}, which are installed, but importing them failed: {type(cause).__name__}: {cause}. "
        f"Mend that package, or let pip choose releases that fit: pip install -U 'infopo_kernels[{extra}]'",
        name=error.name,
    )


def _installed(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """Three release numbers of a version: "2.13.0+cpu" is (2, 13, 0), "5.1" is (5, 1, 0)."""
    release = re.match(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?", version)
    return tuple(int(number or 0) for number in release.groups()) if release else (0, 0, 0)
