"""Errors that the user can correct: one line, no traceback."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Final, NoReturn

_LONGEST: Final = 600
"""Characters of a line; libraries quote whole lists of files and tokens."""


class UserError(ValueError):
    """An error that the user can correct. The command prints the message and exits with code 2."""


def one_line(text: object) -> str:
    """The text without line breaks, cut to `_LONGEST` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."


def _raised_for_bad_input() -> tuple[type[Exception], ...]:
    """The errors that libraries raise for bad input; safetensors has one of its own for a damaged file."""
    kinds = (ValueError, TypeError, OSError, ImportError, NotImplementedError)
    safetensors = sys.modules.get("safetensors")
    return kinds if safetensors is None else (*kinds, safetensors.SafetensorError)


class OneSentence:
    """In front of an `argparse.ArgumentParser`: it says what is wrong in one sentence."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{one_line(message)} (see --help)")


@contextlib.contextmanager
def user_errors(prefix: str = "") -> Iterator[None]:
    """Errors that libraries raise for bad input, as `UserError` with `prefix` before the message."""
    try:
        yield
    except UserError:
        raise
    except _raised_for_bad_input() as error:
        raise UserError(one_line(f"{prefix}{error}")) from error
