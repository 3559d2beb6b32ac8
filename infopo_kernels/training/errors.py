"""The one error that the commands turn into a sentence instead of a traceback."""

from infopo_kernels.integrations.preferences import PreferenceError as UserError

__all__ = ["UserError"]
