"""Preference data: see `infopo_kernels.integrations.preferences`."""

from infopo_kernels.integrations.preferences import Preference, parse_preference, read_preferences

__all__ = ["Preference", "parse_preference", "read_preferences"]
