"""The one error that the commands turn into a sentence instead of a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something that the user can put right: the message says what, where and how."""
