"""A head or sequences that several ranks share: descriptions, collectives, and backends that compute together.

    parallel        who shares what (`VocabShard`, `Parallel`), and the hooks of one call (`Together`)
    vocabulary      the same rows on every rank, each multiplied by the rank's own part of the vocabulary
    collectives     the only file that calls torch.distributed
    agreement       an error on every rank where the ranks of a group disagree, instead of a hang

A shared head is a backend like any other (`backends.base`): it makes the three primitives from those of the rank's own
backend. So `schedule` and the objectives are those of one device.
"""

from infopo_kernels.distributed.parallel import VocabShard

__all__ = ["VocabShard"]
