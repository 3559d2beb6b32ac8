"""Who shares what with whom: `VocabShard` for users, `Parallel` for the ops, `Together` for one call.

`Parallel` goes beside `KernelOptions` from `functional` to `ops`; None stands for one device. In an op it becomes a
`Together`: the backend that computes with the other ranks, and the hooks for sums that they share.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Literal, get_args

import torch.distributed as dist
from torch import Tensor

from infopo_kernels.backends.base import Backend, Gradients, Head
from infopo_kernels.distributed import agreement, collectives
from infopo_kernels.distributed.vocabulary import SameRows

Way = Literal["same_rows"]

_NO_LIMIT = 1 << 40
"""Entries of a vocabulary whose size is not known yet; rows whose logits a part without entries can keep."""


@dataclass(frozen=True)
class VocabShard:
    """`weight` is one rank's part of a head: rows start ... start + len(weight) of the vocabulary.

    The ranks of the group hold adjoining parts in the order of their ranks. The parts may differ in size.

    Args:
        group: the process group whose ranks hold the parts.
        start: first vocabulary entry of this rank's part; None takes parts of equal size, rank * len(weight).
        vocabulary: V; None takes the end of the last part. Rows of `weight` at or beyond V are padding: they count
            nothing, and their gradient is 0.
        way: how the ranks compute together. "same_rows": every rank passes the same rows and gets the same result
            (tensor parallelism); gradients of the hidden states are whole on every rank.

    Raises:
        ValueError, TypeError: a value is of another kind; or, at the first call, on every rank: the parts do not cover
            [0, V), or the ranks disagree in what must be equal.
    """

    group: dist.ProcessGroup
    start: int | None = None
    vocabulary: int | None = None
    way: Way = "same_rows"

    def __post_init__(self) -> None:
        collectives.name_of("group", self.group)
        for name, least in (("start", 0), ("vocabulary", 1)):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"`{name}` must be a whole number or None, got {type(value).__name__} {value!r}.")
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        if self.way not in get_args(Way):
            raise ValueError(f"`way` must be one of {', '.join(map(repr, get_args(Way)))}, got {self.way!r}.")


@dataclass(frozen=True)
class Parallel:
    """What a call shares with other ranks, by the names of the groups; "" for what it does not share."""

    vocab_group: str = ""
    start: int | None = None
    vocabulary: int | None = None
    way: str = ""
    sequence_group: str = ""

    @classmethod
    def of(cls, vocab: VocabShard | None, sequence_group: dist.ProcessGroup | None) -> Parallel | None:
        """None if nothing is shared."""
        if vocab is None and sequence_group is None:
            return None
        if vocab is not None and not isinstance(vocab, VocabShard):
            raise TypeError(f"`vocab` must be a VocabShard or None, got {type(vocab).__name__}.")
        sequence = "" if sequence_group is None else collectives.name_of("sequence_group", sequence_group)
        if vocab is None:
            return cls(sequence_group=sequence)
        group = collectives.name_of("vocab", vocab.group)
        return cls(group, vocab.start, vocab.vocabulary, vocab.way, sequence)

    def to_text(self) -> str:
        """For the schema of an op."""
        return json.dumps(asdict(self))

    @staticmethod
    @lru_cache(maxsize=64)
    def from_text(text: str) -> Parallel:
        return Parallel(**json.loads(text))

    def whole_sequences(self, values: Tensor) -> Tensor:
        """Sums over the parts of each sequence [S] from those of this rank's part."""
        return collectives.sum_over_parts(self.sequence_group, values) if self.sequence_group else values

    def begin(self, backend: Backend, head: Head, same: dict[str, object], check: Callable[[int], None]) -> Together:
        """Compare what the ranks must have in common, then the backend and the hooks of a call.

        `same` holds what has to be equal where the ranks pass the same rows. `check(V)` raises if the values of this
        rank's own input are wrong; then all ranks raise.
        """
        if not self.vocab_group:
            check(len(head.weight))
            return Together(self, backend, None)
        refusal = None
        try:
            check(_NO_LIMIT if self.vocabulary is None else self.vocabulary)
        except ValueError as error:
            refusal = error
        rows = len(head.weight)
        start = collectives.rank(self.vocab_group) * rows if self.start is None else self.start
        same = {
            "hidden.shape[-1]": head.hidden.shape[-1],
            "hidden.dtype": head.hidden.dtype,
            "bias": head.bias is None,
            "softcap, logit_scale / temperature": (head.softcap, head.scale),
            "vocab.way": self.way,
            "vocab.vocabulary": self.vocabulary,
            **same,
        }
        inside = rows if self.vocabulary is None else max(0, min(rows, self.vocabulary - start))
        kept = _NO_LIMIT if inside == 0 else 0
        if inside and head.weight.is_contiguous():
            part = head.weight[:inside]
            kept = backend.kept_rows(replace(head, weight=part), part)
        seen = agreement.compare(
            self.vocab_group, head.hidden.device, same, {"start": start, "rows": rows, "kept": kept}, refusal
        )
        bounds = _covering(seen["start"], seen["rows"], self.vocabulary)
        if self.vocabulary is None:
            check(bounds[-1])
        shared = SameRows(backend, self.vocab_group, bounds, min(seen["kept"]))
        return Together(self, shared, shared)


def _covering(starts: list[int], rows: list[int], vocabulary: int | None) -> list[int]:
    """First entry of each part and V, [R + 1]."""
    ends = [start + count for start, count in zip(starts, rows, strict=True)]
    V = ends[-1] if vocabulary is None else vocabulary
    adjoin = starts[0] == 0 and all(min(end, V) == min(start, V) for end, start in zip(ends, starts[1:], strict=False))
    if not adjoin or ends[-1] < V:
        parts = ", ".join(f"[{start}, {end})" for start, end in zip(starts, ends, strict=True))
        raise ValueError(
            f"`vocab` must describe adjoining parts that cover [0, {V}) in the order of the ranks, got {parts}; give "
            f"each rank the `start` of its rows, and check the group."
        )
    return [*(min(start, V) for start in starts), V]


@dataclass(frozen=True)
class Together:
    """One call: the backend to compute with, and the hooks of `schedule`."""

    parallel: Parallel
    backend: Backend
    """This rank's own, or one that computes with the others."""
    shared: SameRows | None

    @property
    def vocabulary(self) -> int | None:
        """V of a shared head."""
        return None if self.shared is None else self.shared.bounds[-1]

    @property
    def parts_of_sequences(self) -> bool:
        """Whether a rank's rows are parts of its sequences."""
        return bool(self.parallel.sequence_group)

    def whole_sequences(self, values: Tensor) -> Tensor:
        """See `Parallel.whole_sequences`."""
        return self.parallel.whole_sequences(values)

    def finish(self, gradients: Gradients) -> None:
        """Add up, in place, what each rank has a part of."""
        if self.shared is not None and gradients.hidden is not None:
            self.shared.add_up_hidden_(gradients.hidden)
