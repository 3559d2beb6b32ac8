"""The former place of `infopo_kernels.integrations.references`, kept for scripts that import from here."""

from infopo_kernels.integrations.references import Header, ReferenceTable, model_fingerprint, pair_key

__all__ = ["Header", "ReferenceTable", "model_fingerprint", "pair_key"]
