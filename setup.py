"""The optional C++ extension, and the README as a package index shows it. Everything else is in pyproject.toml.

Without a compiler, without torch at build time, or with INFOPO_KERNELS_SKIP_EXTENSION=1, the package installs without
its C++ kernels and prints a message. On a CPU it then uses plain PyTorch.
"""

from __future__ import annotations

import glob
import os
import re
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

EXTENSION = "infopo_kernels._C"
REPOSITORY = os.environ.get("INFOPO_KERNELS_REPOSITORY_URL", "").rstrip("/")
"""Where the repository can be read, for the links of the README on an index; whoever publishes a release sets it."""
SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
"""Compiler flags for `make sanitize`, which builds into another folder."""


def say(message: str) -> None:
    print(f"infopo_kernels: {message}", file=sys.stderr)


def extension_arguments() -> dict[str, Any]:
    """`ext_modules` and `cmdclass`. If the extension cannot be built: prints the reason and returns nothing."""
    if os.environ.get("INFOPO_KERNELS_SKIP_EXTENSION", "") not in ("", "0"):
        say("INFOPO_KERNELS_SKIP_EXTENSION is set: installing without the C++ kernels.")
        return {}
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        say(
            f"torch cannot be imported at build time ({error}): installing without the C++ kernels. "
            "Install torch first and pass --no-build-isolation to have them."
        )
        return {}

    class OptionalBuild(cpp_extension.BuildExtension):  # type: ignore[misc]
        """If the build of the extension fails, the package is installed without it."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                self.extensions: list[Any] = []  # the next step would copy files that do not exist
                say(f"the extension did not build ({error}): installing without the C++ kernels.")
            if self.inplace:  # a file of one Python's own ABI, from before the stable one, would be found first
                for stale in glob.glob("infopo_kernels/_C.cpython-*"):
                    os.remove(stale)

    # One build for every torch from 2.10 and every Python from 3.10: torch's stable ABI, Python's limited API.
    cpp_extension.min_supported_cpython = "0x030a0000"
    sanitizers = SANITIZERS if os.environ.get("INFOPO_KERNELS_SANITIZE", "") not in ("", "0") else []
    extension = cpp_extension.CppExtension(
        EXTENSION,
        sorted(glob.glob("csrc/*.cpp")),
        depends=sorted(glob.glob("csrc/*.h")),
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        py_limited_api=True,
        # -g0: Python adds -g, and debug symbols were nine tenths of the wheel. The warnings switched off are torch's.
        extra_compile_args=["-std=c++20", "-O3", "-g0", "-Wall", "-Wextra", "-Wno-unused-parameter", *sanitizers],
        extra_link_args=sanitizers,
        optional=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": OptionalBuild},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def description_arguments() -> dict[str, Any]:
    """`long_description`: the README with links that lead somewhere from an index, and `project_urls` if known.

    With INFOPO_KERNELS_REPOSITORY_URL=https://HOST/OWNER/NAME links and pictures point into that repository. Without
    it a link becomes its text with the path of the file, which lies in the source distribution, and a picture its
    description.
    """
    text = Path("README.md").read_text(encoding="utf-8")

    def picture(match: re.Match[str]) -> str:
        about, path = match["text"], match["target"]
        return f"![{about}]({REPOSITORY}/raw/HEAD/{path})" if REPOSITORY else f"*(Picture `{path}`: {about})*"

    def link(match: re.Match[str]) -> str:
        label, path = match["text"], match["target"]
        if REPOSITORY:
            return f"[{label}]({REPOSITORY}/blob/HEAD/{path})"
        file = path.partition("#")[0]
        return f"`{file}`" if label.strip("`") == file else f"{label} (`{file}`)"

    relative = r"\[(?P<text>[^\]]*)\]\((?P<target>(?![a-z]+:|#)[^)]+)\)"
    text = re.sub("!" + relative, picture, text)
    text = re.sub("(?<!!)" + relative, link, text)
    urls = {
        "Repository": REPOSITORY,
        "Issues": f"{REPOSITORY}/issues",
        "Changelog": f"{REPOSITORY}/blob/HEAD/CHANGELOG.md",
    }
    return {
        "long_description": text,
        "long_description_content_type": "text/markdown",
        "project_urls": urls if REPOSITORY else {},
    }


setup(**extension_arguments(), **description_arguments())
