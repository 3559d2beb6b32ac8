"""The protocol of an objective: loss, metrics and row weights from the log-probabilities of sequences.

For sequence s with token log-probabilities l_t (t in s, n_s of them scored), a weight u_s (1 if none is given), and P
pairs:

    L_s     = sum_t l_t                      (or its mean, sum_t l_t / n_s, with `average`)          (1)
    Delta_s = L_s - L_s(reference)           (L_s(reference) = 0 without a reference)                (2)
    loss    = sum_s u_s term_s / P                                                                   (3)
    d loss / d l_t = u_s slope_s / P         slope_s = d(sum_r term_r) / d l_t, for each t in s      (4)

An objective defines term_s and slope_s. The library does everything else: which rows take which product, backends,
layouts, autograd. A pairwise objective is a function of the pairs' margins. It pairs the i-th chosen with the i-th
rejected sequence, and gives each of the two half of the pair's term; u_s is the mean of their two weights.

How to add an objective: `docs/objectives.md`.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from infopo_kernels.options import IGNORE_INDEX
from infopo_kernels.packing import Rows, sequence_sums

Known = Literal["none", "some", "all"]
References = Literal["none", "rejected", "all"]


@dataclass(frozen=True)
class Sequences:
    """The sequences of a call, without their log-probabilities."""

    counts: Tensor
    """[S] int64, scored tokens n_s."""
    is_chosen: Tensor
    """[S] bool."""
    ref_logps: Tensor
    """[S] float64, nats, sums or means as the objective says; 0 without a reference."""
    num_pairs: float
    """P."""
    weights: Tensor | None = None
    """[S] float64, u_s; None if all are 1."""
    partner: Tensor | None = None
    """[S] int64, for each sequence the other one of its pair; only for a pairwise objective."""

    def paired(self) -> Sequences:
        """The same sequences with partners; both sequences of a pair get the mean of their two weights.

        The host reads no value back. If the numbers of chosen and rejected sequences differ, at least one sequence gets
        a partner of its own kind. `Pairwise` turns its loss into NaN.
        """
        order = torch.argsort((~self.is_chosen).to(torch.uint8), stable=True)  # chosen first, each half in its order
        partner = torch.empty_like(order).scatter_(0, order, order.roll(len(order) // 2))
        weights = None if self.weights is None else (self.weights + self.weights[partner]) / 2
        return replace(self, weights=weights, partner=partner)


class Terms(NamedTuple):
    """The values of an objective for each sequence; all [S] float64, each a separate tensor."""

    logps: Tensor
    """L_s of equation (1), nats."""
    rewards: Tensor
    """The implicit reward, or what the objective has in its place."""
    loss: Tensor
    """term_s of equation (3), differentiable with respect to the sums."""
    slopes: Tensor
    """slope_s of equation (4), without gradient."""
    weights: Tensor
    """Size of the derivative of the preference loss by L_s, for logging; without gradient."""
    bound: Tensor | None
    """Summands of the lower bound of the mutual information, nats; None if the objective gives no bound."""


class Evaluation(NamedTuple):
    """The value of the objective for a call. The `objective` method of a backend returns it too."""

    loss: Tensor
    """[] float64, equation (3)."""
    mi_lower_bound: Tensor
    """[] float64, nats; NaN if the objective gives no bound."""
    logps: Tensor
    """[S] float64, nats."""
    rewards: Tensor
    """[S] float64."""
    weights: Tensor
    """[S] float64, each multiplied by u_s."""
    row_weight: Tensor
    """[N] in the type of the token log-probabilities, equation (4); 0 for rows that are not scored."""


class Objective(ABC):
    """The protocol. A subclass is a frozen dataclass. Its fields are its options: finite numbers, booleans, or None.

    Defining a subclass with a `name` registers it under that name; the schema of an op holds the name and the options.
    """

    name: ClassVar[str]
    """Unique, lower case."""
    known: ClassVar[Known] = "none"
    """The sequences whose slope_s is known before any log-probability. With "some", the other slopes must not depend on
    the log-probabilities of these sequences."""
    pairwise: ClassVar[bool] = False
    """Whether terms depend on both sequences of a pair."""
    reference: ClassVar[References] = "all"
    """The sequences whose reference log-probabilities the gradients depend on."""

    @property
    @abstractmethod
    def average(self) -> bool:
        """Whether L_s is the mean over the scored tokens instead of the sum."""

    @abstractmethod
    def terms(self, sums: Tensor, sequences: Sequences) -> Terms:
        """Terms and slopes from ``sum_t l_t`` [S] float64."""

    def known_slopes(self, sequences: Sequences) -> Tensor:
        """slope_s [S] float64 where it is known beforehand, NaN elsewhere. Not called if `known` is "none"."""
        raise NotImplementedError(f"{type(self).__name__} says known={self.known!r} and has no `known_slopes`.")

    def __init_subclass__(cls) -> None:
        if "name" not in cls.__dict__:
            return
        present = _BY_NAME.setdefault(cls.name, cls)
        if (present.__module__, present.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"`name` must be unique, got {cls.name!r}, which {present.__qualname__} has already.")
        _BY_NAME[cls.name] = cls  # the same class may be defined again, as in a notebook

    def to_flat(self) -> list[float]:
        """The options as numbers, in the order of the fields; NaN for None."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))  # type: ignore[arg-type]
        return [math.nan if value is None else float(value) for value in values]


_BY_NAME: dict[str, type[Objective]] = {}


def from_flat(name: str, values: list[float]) -> Objective:
    """The objective called `name`, with options from `to_flat`."""
    kind = _BY_NAME[name]
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    options = (
        None if math.isnan(value) else bool(value) if field.type in ("bool", bool) else value
        for field, value in zip(fields, values, strict=True)
    )
    return kind(*options)


def levels(sums: Tensor, sequences: Sequences, average: bool) -> Tensor:
    """L_s of equation (1), [S] float64."""
    return sums / sequences.counts if average else sums


def weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    """values * u_s."""
    return values if weights is None else values * weights


def evaluate(
    objective: Objective,
    logp: Tensor,
    rows: Rows,
    sequences: Sequences,
    whole: Callable[[Tensor], Tensor] | None = None,
) -> Evaluation:
    """Equations (1) to (4) from token log-probabilities [N], in plain PyTorch.

    Where the rows are parts of the sequences, `whole` makes the sums [S] of the sequences from those of the parts.
    """
    assert rows.segments is not None
    sums = sequence_sums(logp, rows.segments, len(sequences.is_chosen))
    if whole is not None:
        sums = whole(sums)
    # A sequence without a scored token has no log-probability. NaN says so; 0 would look like a real value.
    sums = torch.where(sequences.counts > 0, sums, torch.nan)
    each, u, P = objective.terms(sums, sequences), sequences.weights, sequences.num_pairs
    loss = weighted(each.loss, u).sum() / P
    slopes = (weighted(each.slopes, u) / P)[rows.segments]
    return Evaluation(
        loss=loss,
        mi_lower_bound=torch.full_like(loss, torch.nan) if each.bound is None else weighted(each.bound, u).sum() / P,
        logps=each.logps,
        rewards=each.rewards,
        weights=weighted(each.weights, u),
        row_weight=torch.where(rows.labels != IGNORE_INDEX, slopes, 0.0).to(logp.dtype),
    )
