"""What the pages import or name as code of the package is public: it stands on an API page."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import infopo_kernels

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTED = {
    name
    for page in (ROOT / "docs" / "api").glob("*.md")
    for name in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.M)
}
"""Modules, of which a page shows all public members, and single objects."""


def named(text: str) -> set[str]:
    """Full names in the imports of a page's code, and in its inline code; a logger's name is no import."""
    names = set(re.findall(r"(?<!logger )`(infopo_kernels(?:\.\w+)+)", text))
    for module, imported in re.findall(r"^from (infopo_kernels[\w.]*) import ([\w, ]+)", text, flags=re.M):
        names |= {f"{module}.{name.strip()}" for name in imported.split(",")}
    return names


NAMES = sorted({name for page in PAGES for name in named(page.read_text())})


def is_documented(name: str) -> bool:
    """As itself, as a member of a module, as a module with a member on a page, or under another name."""
    module, _, last = name.rpartition(".")
    if last.startswith("_"):
        return False
    if name in DOCUMENTED or module in DOCUMENTED or any(each.startswith(f"{name}.") for each in DOCUMENTED):
        return True
    try:
        value = getattr(importlib.import_module(module), last)
    except (ImportError, AttributeError):
        return False
    others = [each for each in infopo_kernels.__all__ if f"infopo_kernels.{each}" in DOCUMENTED]
    return value.__module__ in DOCUMENTED or any(value is getattr(infopo_kernels, each) for each in others)


@pytest.mark.parametrize("name", NAMES)
def test_names_of_the_pages_are_on_an_api_page(name: str) -> None:
    assert is_documented(name), f"{name} is on no page in docs/api"


def test_what_is_on_no_page_is_found() -> None:
    text = "`infopo_kernels.a.b(x)` of logger `infopo_kernels.c`\nfrom infopo_kernels.d import E, f  # why\n"
    assert named(text) == {
        "infopo_kernels.a.b",
        "infopo_kernels.d.E",
        "infopo_kernels.d.f",
    }
    assert is_documented("infopo_kernels.InfoPO")
    assert is_documented("infopo_kernels.InfoPOOptions"), "another name of it"
    assert is_documented("infopo_kernels.objectives.Objective"), "documented where it is defined"
    assert not is_documented("infopo_kernels.backends.cpp.CppBackend")
    assert not is_documented("infopo_kernels.naive._rows")
    assert not is_documented("infopo_kernels.nothing.here")
