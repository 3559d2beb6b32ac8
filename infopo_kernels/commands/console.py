"""What the user sees: only the first process prints."""

from __future__ import annotations

import os
import warnings

import datasets
import transformers
from rich.console import Console


def is_main() -> bool:
    """Whether this is the first process of all."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """One line, from the first process."""
    if is_main():
        print(text, flush=True)


def wide_console() -> Console:
    """For tables: rich takes 80 columns where it cannot ask a terminal, and they need more."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def quiet_other_processes() -> None:
    """Silence logs, bars and warnings of libraries on every process but the first."""
    if not is_main():
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        datasets.utils.logging.set_verbosity_error()
        datasets.disable_progress_bars()
        warnings.simplefilter("ignore")
