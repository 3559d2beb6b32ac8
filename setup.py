"""The optional C++ extension; everything else about the package stands in pyproject.toml.

Without a compiler, without torch at build time, or with INFOPO_KERNELS_SKIP_EXTENSION=1, the package installs without
its C++ kernels and says so; plain PyTorch serves on a CPU then.
"""

from __future__ import annotations

import glob
import os
import sys
from typing import Any

from setuptools import setup

EXTENSION = "infopo_kernels._C"
SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
"""For `make sanitize`; the build then goes elsewhere."""


def say(message: str) -> None:
    print(f"infopo_kernels: {message}", file=sys.stderr)


def extension_arguments() -> dict[str, Any]:
    """`ext_modules` and `cmdclass`, or nothing, with the reason printed."""
    if os.environ.get("INFOPO_KERNELS_SKIP_EXTENSION", "") not in ("", "0"):
        say("INFOPO_KERNELS_SKIP_EXTENSION is set: installing without the C++ kernels.")
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        say(
            f"torch cannot be imported at build time ({error}): installing without the C++ kernels. "
            "Install torch first and pass --no-build-isolation to have them."
        )
        return {}

    class OptionalBuild(BuildExtension):  # type: ignore[misc]
        """A build that fails leaves the package without the extension, not without the package."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                self.extensions: list[Any] = []  # what comes after would copy files that are not there
                say(f"the extension did not build ({error}): installing without the C++ kernels.")

    # at::parallel_for is a template over OpenMP: without the flag it is a plain loop. Apple's compiler lacks the flag.
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    sanitizers = SANITIZERS if os.environ.get("INFOPO_KERNELS_SANITIZE", "") not in ("", "0") else []
    extension = CppExtension(
        EXTENSION,
        sorted(glob.glob("csrc/*.cpp")),
        depends=sorted(glob.glob("csrc/*.h")),
        # torch's headers have unused parameters
        extra_compile_args=["-std=c++20", "-O3", "-Wall", "-Wextra", "-Wno-unused-parameter", *openmp, *sanitizers],
        extra_link_args=[*openmp, *sanitizers],
        optional=True,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuild}}


setup(**extension_arguments())
