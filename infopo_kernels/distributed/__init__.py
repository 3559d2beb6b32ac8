"""A head or sequences that several ranks share: descriptions, collectives, and backends that compute together.

    parallel        who shares what (`VocabShard`, `Parallel`), and the hooks of one call (`Together`)
    same_rows       the same rows on every rank, each multiplied by the rank's own part of the vocabulary
    own_rows        rows of its own on every rank: they travel to the parts
    ring            rows of its own on every rank: the parts travel to them
    gathered_head   rows of its own on every rank: the whole head comes to them
    choice          which of these moves the fewest bytes
    sharded         DTensors as parts of a head
    collectives     the only file that calls torch.distributed
    shared_backend  what these backends have in common; `parts`: the parts of a vocabulary
    agreement       an error on every rank where the ranks of a group disagree, instead of a hang

A shared head is a backend like any other (`backends.base`): it makes the three primitives from those of the rank's own
backend. So `schedule` and the objectives are those of one device.
"""

from infopo_kernels.distributed.parallel import VocabShard

__all__ = ["VocabShard"]
