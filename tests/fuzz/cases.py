"""Random cases of the three primitives, ordinary and extreme, and their check against float64."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from infopo_kernels import LogitOptions, naive
from infopo_kernels.backends.base import Backend, Gradients, Head, TailReport, with_memory_for_logits
from infopo_kernels.options import ELSEWHERE, IGNORE_INDEX
from tests.budget import (
    HALF_STEP,
    SMALLEST,
    Budget,
    accumulated,
    assert_within,
    error_budget,
    kept_rounding,
    operand_rounding,
)
from tests.primitives import Plain, plain

_NEAR = 1.02
"""Room for roundings of what is pooled: kept logits of float16 (at most 1 %), mean rows of W of bfloat16."""
RED_ZONE = 64
"""Numbers before and after each result that a kernel must not write."""


@dataclass(frozen=True)
class Case:
    """The description of a case; it and the seed determine the tensors."""

    seed: int
    backend: str
    dtype: torch.dtype
    weight_dtype: torch.dtype
    N: int
    H: int
    V: int
    way: str
    """known (weights given), lse (logsumexp given), kept (logits in the memory of dW)"""
    wanted: str
    """letters of x, w, b"""
    bias: str
    """none, random, or masked: some entries at -inf"""
    softcap: float | None
    scale: float
    hidden_size: float
    weight_size: float
    c_size: float
    ignored: float
    elsewhere: float
    """Share of the labels that lie in another part of the vocabulary."""
    threshold: float
    """Of the pooled tail; 0 for exact gradients."""
    strided: bool
    workspace: int
    threads: int


def draw(seed: int, backends: list[str]) -> Case:
    """The case of a seed."""
    r = random.Random(seed)
    backend = r.choice(backends)
    small = backend == "triton"  # interpreted
    dtype = r.choice([torch.float32, torch.bfloat16, torch.float16])
    if backend in ("cpp-avx512_bf16", "cpp-amx"):
        dtype = torch.bfloat16
    N = r.choice([0, 1, r.randint(1, 20), r.randint(1, 20 if small else 100)])
    H = r.choice([1, r.randint(1, 40), r.randint(1, 40 if small else 130), 16 if small or r.random() < 0.8 else 1024])
    V = r.choice([1, 2, r.randint(1, 100), r.randint(1, 100 if small else 1200)])
    softcap = r.choice([None, None, 10 ** r.uniform(-0.5, 2)])
    scale = r.choice([1.0, r.uniform(0.1, 2), -r.uniform(0.1, 2)])
    masks = softcap is None and scale > 0
    wild = r.random() < 0.3
    size = (lambda low, high: 10 ** r.uniform(low, high)) if wild else (lambda low, high: 10 ** r.uniform(-1, 0.5))
    high = 2 if dtype == torch.float16 else 12
    wanted = "".join(letter for letter in "xwb" if r.random() < 0.7) or "x"
    way = r.choice(["known", "lse", "kept"])
    pools = not small and not wild and r.random() < 0.4  # of wild logits no bound says which words are pooled
    return Case(
        seed=seed,
        backend=backend,
        dtype=dtype,
        weight_dtype=r.choice([dtype, torch.float32]),
        N=N,
        H=H,
        V=V,
        way=way,
        wanted=wanted + "w" if way == "kept" and "w" not in wanted else wanted,
        bias=r.choice(["none", "random", "masked" if masks else "random"]),
        softcap=softcap,
        scale=scale,
        hidden_size=size(-high / 4, high / 2),
        weight_size=size(-high / 4, high),
        c_size=10 ** r.uniform(-9, 2) if r.random() < 0.5 else 1.0,
        ignored=r.choice([0.0, 0.3, 0.95, 1.0]),
        elsewhere=r.choice([0.0, 0.0, 0.0, 0.5]),
        threshold=10 ** r.uniform(-6, -0.1) if pools else 0.0,
        strided=r.random() < 0.3,
        workspace=r.choice([1 << 20, 1 << 20, 1 << 25]),
        threads=r.choice([1, 2, 3]),
    )


def check(case: Case, backend: Backend) -> None:
    """Run the case. Raises AssertionError if a result exceeds its budget, or if a kernel wrote outside its results."""
    head, labels, c = _inputs(case)
    zones = _Zones(case)
    got = zones.gradients
    before = {"weight": got.weight, "bias": got.bias}
    before = {name: None if value is None else value.double() for name, value in before.items()}
    scored, touched = labels != IGNORE_INDEX, labels != IGNORE_INDEX
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        if case.way == "known":
            l, lse = backend.logprob_and_grad(head, labels, c, got)  # noqa: E741
        else:
            l, lse = backend.logprob(head, labels)  # noqa: E741
            touched = scored & (c != 0)
            kept = None
            if case.way == "kept" and got.weight is not None:
                most = backend.kept_rows(head, got.weight)
                kept = torch.where(scored & (scored.cumsum(0) <= most), labels, IGNORE_INDEX) if most else None
                if kept is not None:
                    got.weight.fill_(torch.nan)
                    before["weight"] = torch.zeros(case.V, case.H, dtype=torch.float64)
                    head, got = with_memory_for_logits(backend, head, got, most)
                    backend.logprob(head, kept, got)
            backend.backward(head, labels, lse, c, got, kept)
    finally:
        torch.set_num_threads(threads)

    name = case.backend.partition("-")[0]
    operand = operand_rounding(name, case.dtype)
    # Kernels with a pooled tail keep a chunk's logits, too.
    rounded = kept_rounding(name, case.dtype) if case.way == "kept" or case.threshold > 0 else 0.0
    truth, allowed = plain(head, labels, c), error_budget(head, labels, c, operand=operand, kept=rounded)
    exact, tail = allowed, None if got.tail is None else _Tail.of(head, labels, c, truth)
    if tail is not None and got.tail is not None:
        tail.check_report(got.tail, bool(scored.any()), case.V)
        allowed = tail.widened(allowed)
    added = accumulated(case.N, HALF_STEP[torch.float32])
    assert_within("l", l, truth.l, allowed.l)
    assert_within("lse", lse, truth.lse, allowed.lse)
    zones.check()
    if got.hidden is not None:
        assert got.hidden[~touched].isnan().all(), "dX: rows that take no part were written"
        _assert_in_range("dX", got.hidden[touched], truth.hidden[touched], allowed.hidden[touched])
    for key in ("weight", "bias"):
        value, first = getattr(got, key), before[key]
        if value is not None and first is not None:
            limit = getattr(allowed, key) + added * first.abs()
            _assert_in_range(f"d{key}", value, first + getattr(truth, key), limit)
            if tail is not None and key == "weight":
                tail.check_sums(value, first + truth.weight, exact.weight + (added + operand) * first.abs(), operand)


@dataclass(frozen=True)
class _Tail:
    """What a pooled tail may change, whatever the chunks (which depend on backend, workspace and threads).

    A word v with p_tv >= θ, or the label of t, is kept in the chunk of row t. So row t pools at most
    Q_t = sum of p_tv over all other words. With the words' exact gradients dX, dW, each pooled one differs by

        |dX_t|        at most  2 |c_t scale| Q_t max_v |W_v|
        |dW_v|        at most  sum_t |c_t scale| (p_tv + Q_t) |X_t|
        sum_v dW_v    by 0, and sum_v |dW_v| at most 2 sum_t |c_t scale| Q_t |X_t|:  a row of G keeps its sum
    """

    live: Tensor
    """[N]: rows with a gradient."""
    p: Tensor
    """[N, V], 0 for words that are kept for sure."""
    pull: Tensor
    """[N]: |c_t scale|, 0 for rows without a gradient."""
    hidden: Tensor
    """[N, H] |X|, 0 for rows without a gradient."""
    widest: Tensor
    """[H]: max_v |W_v|."""

    @classmethod
    def of(cls, head: Head, labels: Tensor, c: Tensor, truth: Plain) -> _Tail:
        live = (labels != IGNORE_INDEX) & (c != 0)
        x = torch.where(live[:, None], head.hidden.double(), 0.0)
        z = naive.logits(x, head.weight.double(), None if head.bias is None else head.bias.double(), _logit(head))
        p = torch.where(live[:, None], (z - truth.lse[:, None]).exp(), 0.0)
        p[p >= head.tail_threshold * _NEAR] = 0.0  # rounding may put a word on the other side of θ
        own = (live & (labels >= 0)).nonzero().squeeze(1)
        p[own, labels[own]] = 0.0
        pull = torch.where(live, c.double().abs() * abs(head.scale), 0.0)
        return cls(live, p, pull, x.abs(), head.weight.double().abs().amax(0))

    @property
    def most(self) -> Tensor:
        """Q [N]."""
        return self.p.sum(1)

    def check_report(self, report: TailReport, scored: bool, vocabulary: int) -> None:
        kept, columns = report.columns.tolist()
        assert 0 <= kept <= columns, f"{kept} of {columns} columns kept"
        assert columns % vocabulary == 0, f"{columns} columns of a vocabulary of {vocabulary}"
        assert bool(self.live.any()) <= (columns > 0) <= scored, "columns without rows, or rows without columns"
        assert torch.equal(report.mass.isnan(), ~self.live), "mass: rows that take no part were written, or others not"
        mass, most = report.mass[self.live].double(), self.most[self.live]
        assert ((mass >= 0) & (mass <= most * _NEAR + 1e-6)).all(), "more was pooled than the threshold allows"

    def widened(self, exact: Budget) -> Budget:
        """The budget of exact gradients, with room for the pools."""
        pooled = self.pull * self.most
        dX = _NEAR * 2 * pooled[:, None] * self.widest
        dW = _NEAR * (self.pull[:, None] * self.p + pooled[:, None]).T @ self.hidden
        db = _NEAR * (self.pull @ self.p + pooled.sum())
        return replace(exact, hidden=exact.hidden + dX, weight=exact.weight + dW, bias=exact.bias + db)

    def check_sums(self, got: Tensor, truth: Tensor, exact: Tensor, operand: float) -> None:
        """The two bounds of sums over the vocabulary, for `got` and `truth` [V, H]."""
        if not _fits(got, truth, exact).all():
            return
        error, pooled = got.double() - truth, (self.pull * self.most) @ self.hidden
        rounding = (exact + HALF_STEP[got.dtype] * (truth.abs() + error.abs()) + SMALLEST[got.dtype]).sum(0)
        moved = float((error.sum(0).abs() - rounding - (1e-5 + 2 * operand) * pooled).max())
        assert moved <= 0, f"dweight: the sum over the vocabulary is off by {moved:.3g} more than rounding"
        assert (error.abs().sum(0) <= rounding + 2 * _NEAR * pooled).all(), "dweight: pools moved more than they hold"


def _logit(head: Head) -> LogitOptions:
    return LogitOptions(head.softcap, head.scale)


def _fits(got: Tensor, truth: Tensor, allowed: Tensor) -> Tensor:
    """Entries that fit the type of the result and of the sums that lead to it."""
    return truth.abs() + allowed < min(torch.finfo(got.dtype).max, 1e37) / 2


def _assert_in_range(name: str, got: Tensor, truth: Tensor, allowed: Tensor) -> None:
    fits = _fits(got, truth, allowed)
    assert_within(name, got[fits], truth[fits], allowed[fits])


def _inputs(case: Case) -> tuple[Head, Tensor, Tensor]:
    g = torch.Generator().manual_seed(case.seed)
    hidden = torch.randn(case.N, case.H, generator=g) * case.hidden_size
    weight = torch.randn(case.V, case.H, generator=g) * (case.weight_size / case.H**0.5)
    labels = torch.randint(case.V, (case.N,), generator=g)
    labels[torch.rand(case.N, generator=g) < case.elsewhere] = ELSEWHERE
    labels[torch.rand(case.N, generator=g) < case.ignored] = IGNORE_INDEX
    hidden[labels == IGNORE_INDEX] = torch.nan  # never read
    c = torch.randn(case.N, generator=g) * case.c_size
    c[torch.rand(case.N, generator=g) < 0.2] = 0
    bias = None
    if case.bias != "none":
        bias = torch.randn(case.V, generator=g)
        if case.bias == "masked":
            bias[torch.rand(case.V, generator=g) < 0.4] = -torch.inf
            bias[-1] = 0.0  # an entry is left
        bias = bias.to(case.dtype)
    rows = (hidden.to(case.dtype), weight.to(case.dtype))
    if case.strided:
        rows = tuple(_apart(x) for x in rows)
    return Head(rows[0], rows[1], bias, case.softcap, case.scale, case.workspace, case.threshold), labels, c


def _apart(x: Tensor) -> Tensor:
    """The same values with NaN between the rows; last stride 1."""
    wide = torch.full((x.shape[0], x.shape[1] + 5), torch.nan, dtype=x.dtype)
    wide[:, 2:-3] = x
    return wide[:, 2:-3]


class _Zones:
    """Result buffers inside larger buffers; the rest of these must not change."""

    def __init__(self, case: Case) -> None:
        self.wide: list[Tensor] = []
        weight = self._cut(case.V, case.H, dtype=case.weight_dtype, fill=1 / 16) if "w" in case.wanted else None
        bias = self._cut(case.V, dtype=torch.float32, fill=1 / 16) if "b" in case.wanted else None
        hidden = self._cut(case.N, case.H, dtype=case.dtype, fill=torch.nan) if "x" in case.wanted else None
        report = None
        if case.threshold > 0:
            mass = self._cut(case.N, dtype=torch.float32, fill=torch.nan)
            report = TailReport(mass, self._cut(2, dtype=torch.float64, fill=0.0))
        self.gradients = Gradients(hidden, weight, bias, report)

    def _cut(self, *shape: int, dtype: torch.dtype, fill: float) -> Tensor:
        n = torch.Size(shape).numel()
        self.wide.append(torch.full((n + 2 * RED_ZONE,), 7.0, dtype=dtype))
        return self.wide[-1][RED_ZONE : RED_ZONE + n].view(shape).fill_(fill)

    def check(self) -> None:
        for wide in self.wide:
            assert (wide[:RED_ZONE] == 7).all(), "written before a result"
            assert (wide[-RED_ZONE:] == 7).all(), "written behind a result"
