"""Who shares what with whom: `VocabShard` for users, `Parallel` for the ops, `Together` for one call.

`Parallel` goes beside `KernelOptions` from `functional` to `ops`; None stands for one device. In an op it becomes a
`Together`: the backend that computes with the other ranks, and the hooks for sums that they share.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Literal, Protocol, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from infopo_kernels.backends.base import Backend, Gradients, Head
from infopo_kernels.distributed import agreement, collectives
from infopo_kernels.distributed.choice import Sizes, Work, cheapest
from infopo_kernels.distributed.gathered_head import GatheredHead
from infopo_kernels.distributed.own_rows import TravellingRows
from infopo_kernels.distributed.parts import Parts
from infopo_kernels.distributed.ring import Ring
from infopo_kernels.distributed.same_rows import SameRows
from infopo_kernels.distributed.sharded import is_sharded, part_of
from infopo_kernels.options import require_bool

Way = Literal["same_rows", "auto", "rows", "ring", "gather"]

_LOG = logging.getLogger(__name__)

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
            (tensor parallelism); gradients of the hidden states are whole on every rank. The others are for rows that
            differ from rank to rank (data parallelism), each with a loss of its own: "rows" send rows to the parts,
            "ring" parts to the rows, "gather" the whole head to every rank. "auto" takes the one that moves the fewest
            bytes (`infopo_kernels.distributed.choice`) and logs which it is. Every rank has to make the same calls.
        average: divide the gradients of weight and bias, which add up over the rows of all ranks, by the number of
            ranks, as a wrapper that averages gradients does (FSDP). Not for "same_rows", where nothing adds up.

    Raises:
        ValueError, TypeError: a value is of another kind; or, at the first call, on every rank: the parts do not cover
            [0, V), or the ranks disagree in what must be equal.
    """

    group: dist.ProcessGroup
    start: int | None = None
    vocabulary: int | None = None
    way: Way = "same_rows"
    average: bool = False

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
        require_bool("average", self.average)
        if self.average and self.way == "same_rows":
            raise ValueError("`average=True` must go with rows that differ from rank to rank, got way='same_rows'.")

    @classmethod
    def of(cls, weight: Tensor, *, way: Way = "same_rows", average: bool = False) -> VocabShard:
        """The description of a DTensor [V, H] that is cut along its vocabulary (Shard(0)).

        Raises:
            TypeError: it is cut in another way.
        """
        if not is_sharded(weight):
            raise TypeError(f"`weight` must be a DTensor, got {type(weight).__name__}; make a VocabShard of its parts.")
        return cls(*part_of("weight", weight), way, average)


@dataclass(frozen=True)
class Parallel:
    """What a call shares with other ranks, by the names of the groups; "" for what it does not share."""

    vocab_group: str = ""
    start: int | None = None
    vocabulary: int | None = None
    way: str = ""
    average: bool = False
    sequence_group: str = ""

    @classmethod
    def of(cls, vocab: VocabShard | None, sequence_group: dist.ProcessGroup | None, weight: Tensor) -> Parallel | None:
        """None if nothing is shared."""
        if vocab is None and is_sharded(weight):
            vocab = VocabShard.of(weight)
        if vocab is None and sequence_group is None:
            return None
        if vocab is not None and not isinstance(vocab, VocabShard):
            raise TypeError(f"`vocab` must be a VocabShard or None, got {type(vocab).__name__}.")
        sequence = "" if sequence_group is None else collectives.name_of("sequence_group", sequence_group)
        if vocab is None:
            return cls(sequence_group=sequence)
        group = collectives.name_of("vocab", vocab.group)
        return cls(group, vocab.start, vocab.vocabulary, vocab.way, vocab.average, sequence)

    def to_text(self) -> str:
        """For the schema of an op; torch.compile traces this, and json is beyond it."""
        numbers = ["" if value is None else str(value) for value in (self.start, self.vocabulary)]
        return "\n".join((self.vocab_group, *numbers, self.way, str(self.average), self.sequence_group))

    @staticmethod
    @lru_cache(maxsize=64)
    def from_text(text: str) -> Parallel:
        vocab_group, first, size, way, average, sequence_group = text.split("\n")
        start, vocabulary = (int(value) if value else None for value in (first, size))
        return Parallel(vocab_group, start, vocabulary, way, average == "True", sequence_group)

    @property
    def shares_head(self) -> bool:
        """Whether the ranks of a group hold parts of a head."""
        return bool(self.vocab_group)

    def whole_sequences(self, values: Tensor) -> Tensor:
        """Sums over the parts of each sequence [S] from those of this rank's part."""
        return collectives.sum_over_parts(self.sequence_group, values) if self.sequence_group else values

    def common_gradient(self, grad: Tensor) -> Tensor:
        """`grad` [], if all ranks of a shared head have the same; else NaN, and on a CPU an error on every rank."""
        if not self.vocab_group:
            return grad.clone()
        every = collectives.gathered(self.vocab_group, grad)
        if grad.device.type == "cpu" and not ((every == grad) | every.isnan()).all():
            raise ValueError(
                f"The gradient of the loss must be the same on all ranks that share a head, got {every.tolist()}; "
                f"multiply the loss by the same number on each rank, or give them `sequence_weights`."
            )
        return torch.where((every == grad).all(), grad, torch.nan)

    def begin(self, backend: Backend, head: Head, call: Call) -> Together:
        """Compare what the ranks must have in common, then the backend and the hooks of a call.

        Raises:
            ValueError: on every rank, if they disagree, or if one refuses its input.
        """
        if not self.vocab_group:
            call.check(len(head.weight))
            return Together(self, backend, None)
        refusal = None
        try:
            call.check(_NO_LIMIT if self.vocabulary is None else self.vocabulary)
        except ValueError as error:
            refusal = error
        rows = len(head.weight)
        start = collectives.rank(self.vocab_group) * rows if self.start is None else self.start
        same = {
            "hidden.shape[-1]": head.hidden.shape[-1],
            "hidden.dtype": head.hidden.dtype,
            "bias": head.bias is not None,
            "softcap, logit_scale / temperature": (head.softcap, head.scale),
            "workspace_mib": head.workspace_bytes >> 20,
            "tail_threshold": head.tail_threshold,
            "vocab.way": self.way,
            "vocab.average": self.average,
            "vocab.vocabulary": self.vocabulary,
            "requires_grad of hidden, weight and bias": call.wanted,
            **call.same,
        }
        same |= call.same_rows if self.way == "same_rows" else dict.fromkeys(call.same_rows)
        own = {"start": start, "rows": rows, "kept": self._kept_rows(backend, head, start), "scored": call.scored()}
        seen = agreement.compare(self.vocab_group, head.hidden.device, same, own, refusal)
        parts = Parts(self.vocab_group, _covering(seen["start"], seen["rows"], self.vocabulary))
        if self.vocabulary is None:
            call.check(parts.bounds[-1])
        if self.way == "same_rows":
            same_rows = SameRows(backend, parts, min(seen["kept"]))
            return Together(self, same_rows, same_rows)
        return self._with_own_rows(backend, head, parts, max(seen["scored"]), call)

    def _kept_rows(self, backend: Backend, head: Head, start: int) -> int:
        inside = len(head.weight)
        if self.vocabulary is not None:
            inside = max(0, min(inside, self.vocabulary - start))
        if not inside:
            return _NO_LIMIT
        part = head.weight[:inside]
        return backend.kept_rows(replace(head, weight=part), part) if part.is_contiguous() else 0

    def _with_own_rows(self, backend: Backend, head: Head, parts: Parts, scored: int, call: Call) -> Together:
        way = self.way
        if way == "auto":
            V, H = parts.bounds[-1], head.hidden.shape[1]
            sizes = Sizes(parts.ranks, scored, V, H, head.hidden.dtype.itemsize, head.accumulator_dtype.itemsize)
            way = cheapest(sizes, call.work, head.workspace_bytes)
            _state(way, parts.ranks, V, H)
        if way == "gather":
            gathered = GatheredHead(parts, backend, len(head.weight), average=self.average)
            return Together(self, backend, gathered)
        shared = (TravellingRows if way == "rows" else Ring)(backend, parts, average=self.average)
        return Together(self, shared, shared)


@cache
def _state(way: str, ranks: int, V: int, H: int) -> None:
    """Say once which way was chosen for a head."""
    _LOG.info("A head of %d x %d on %d ranks: way %r moves the fewest bytes for this batch.", V, H, ranks, way)


@dataclass(frozen=True)
class Call:
    """What an op knows of a call."""

    check: Callable[[int], None]
    """Of V: raises ValueError if values of this rank's input are wrong."""
    scored: Callable[[], int]
    """The number of scored rows."""
    same: dict[str, object]
    """By argument, what all ranks must have in common."""
    same_rows: dict[str, object]
    """And what they must have in common where they pass the same rows."""
    wanted: list[bool]
    """Which gradients are wanted: of hidden, weight and bias."""
    work: Work
    """What the call computes."""


class Shared(Protocol):
    """What a way of sharing a head does before and after the primitives of a call."""

    def whole_head(self, head: Head) -> Head:
        """The head that the primitives get."""
        ...

    def without_padding(self, head: Head) -> Head:
        """That head without rows that stand for no word, which may hold anything."""
        ...

    def finish(self, gradients: Gradients) -> Gradients:
        """This rank's gradients, from those of the primitives."""
        ...


def _covering(starts: list[int], rows: list[int], vocabulary: int | None) -> tuple[int, ...]:
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
    return (*(min(start, V) for start in starts), V)


@dataclass(frozen=True)
class Together:
    """One call: the backend to compute with, and the hooks of `schedule`."""

    parallel: Parallel
    backend: Backend
    """This rank's own, or one that computes with the others."""
    shared: Shared | None

    @property
    def own_backend(self) -> bool:
        """Whether the backend is this rank's own, so that what it is asked for is no other rank's concern."""
        return self.shared is None or isinstance(self.shared, GatheredHead)

    @property
    def known_weights_pay(self) -> bool:
        """Whether `logprob_and_grad` saves anything: where rows travel, or on a head that is whole."""
        return not isinstance(self.shared, (SameRows, Ring))

    @property
    def parts_of_sequences(self) -> bool:
        """Whether a rank's rows are parts of its sequences."""
        return bool(self.parallel.sequence_group)

    def whole_sequences(self, values: Tensor) -> Tensor:
        """See `Parallel.whole_sequences`."""
        return self.parallel.whole_sequences(values)

    def whole_head(self, head: Head) -> Head:
        """The head that the backend gets."""
        return head if self.shared is None else self.shared.whole_head(head)

    def without_padding(self, head: Head) -> Head:
        """That head without rows that stand for no word."""
        return head if self.shared is None else self.shared.without_padding(head)

    def bounds(self, most: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Of all ranks that share the head: the larger of `most` [..], and `sums` [..] over rows that count once."""
        if self.shared is None:
            return most, sums
        every_most, every_sum = collectives.gathered(self.parallel.vocab_group, torch.stack([most, sums])).unbind(1)
        same_rows = self.parallel.way == "same_rows"
        return every_most.amax(0), every_sum.amax(0) if same_rows else every_sum.sum(0)

    def finish(self, gradients: Gradients) -> Gradients:
        """This rank's gradients, from those that the backend formed."""
        return gradients if self.shared is None else self.shared.finish(gradients)
