"""docs/environment.md names every variable that the package, its build and the Makefile read, and no other."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECTIONS = dict(
    re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", (ROOT / "docs/environment.md").read_text(), flags=re.M | re.S)
)


def documented(section: str) -> set[str]:
    """Names in the first column of a section's table."""
    rows = re.findall(r"^\| (`.*?) \|", SECTIONS[section], flags=re.M)
    return {name for row in rows for name in re.findall(r"`([A-Z_]+)`", row)}


def read_by(*files: Path) -> set[str]:
    """Names in calls that read the environment."""
    call = re.compile(r"""(?:environ\.get\(|environ\[|getenv\()\s*"([A-Z_]+)\"""")
    return {name for file in files for name in call.findall(file.read_text())}


def named_in(*files: Path) -> set[str]:
    """The project's own names, wherever they stand, in comments too."""
    return {name for file in files for name in re.findall(r"INFOPO_KERNELS_[A-Z_]+", file.read_text())}


PACKAGE = [*ROOT.glob("infopo_kernels/**/*.py"), *ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/*.h")]
BUILD = [ROOT / "setup.py"]
DOCUMENTATION = set(re.findall(r"!ENV \[?([A-Z_]+)", (ROOT / "mkdocs.yml").read_text()))
LAUNCHERS = {"RANK", "LOCAL_RANK"}


def test_what_is_read_is_documented() -> None:
    assert read_by(*PACKAGE) - LAUNCHERS == documented("Read by the package")
    assert read_by(*BUILD) == documented("Read when the package is built") - {"MAX_JOBS"}, "MAX_JOBS is torch's"
    assert documented("Read when the documentation is built") == DOCUMENTATION
    for name in LAUNCHERS:
        assert f"`{name}`" in SECTIONS["Read by launchers"]


def test_what_is_named_is_read() -> None:
    """A name that only comments know is one that was taken away."""
    assert named_in(*PACKAGE, *BUILD) == {
        name for name in read_by(*PACKAGE, *BUILD) if name.startswith("INFOPO_KERNELS_")
    }


def test_variables_of_make_are_documented() -> None:
    """Those that a caller may set: assigned with ?=, or used where nothing assigns them, and the list of Tritons."""
    text = (ROOT / "Makefile").read_text()
    assigned = set(re.findall(r"^([A-Z_]+) *:=", text, flags=re.M))
    offered = set(re.findall(r"^([A-Z_]+) *\?=", text, flags=re.M))
    used = set(re.findall(r"\$\((?:filter-out 0,\$\()?(?:if \$\()?([A-Z_]+)[):]", text))
    own = {"CURDIR", "PYTHONPATH"}  # of make, of Python
    assert documented("Read by make") == (offered | used) - assigned - own | {"TRITONS"}
