"""Random cases of the three primitives, ordinary and extreme, and their check against float64."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from infopo_kernels.backends.base import Backend, Gradients, Head, with_memory_for_logits
from infopo_kernels.options import IGNORE_INDEX
from tests.budget import HALF_STEP, accumulated, assert_within, error_budget, kept_rounding, operand_rounding
from tests.primitives import plain

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
    rounded = kept_rounding(name, case.dtype) if case.way == "kept" else 0.0
    truth, allowed = plain(head, labels, c), error_budget(head, labels, c, operand=operand, kept=rounded)
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


def _assert_in_range(name: str, got: Tensor, truth: Tensor, allowed: Tensor) -> None:
    """Entries that fit the type of the result and of the sums that lead to it."""
    fits = truth.abs() + allowed < min(torch.finfo(got.dtype).max, 1e37) / 2
    assert_within(name, got[fits], truth[fits], allowed[fits])


def _inputs(case: Case) -> tuple[Head, Tensor, Tensor]:
    g = torch.Generator().manual_seed(case.seed)
    hidden = torch.randn(case.N, case.H, generator=g) * case.hidden_size
    weight = torch.randn(case.V, case.H, generator=g) * (case.weight_size / case.H**0.5)
    labels = torch.randint(case.V, (case.N,), generator=g)
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
    return Head(rows[0], rows[1], bias, case.softcap, case.scale, case.workspace), labels, c


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
        self.gradients = Gradients(hidden, weight, bias)

    def _cut(self, *shape: int, dtype: torch.dtype, fill: float) -> Tensor:
        n = torch.Size(shape).numel()
        self.wide.append(torch.full((n + 2 * RED_ZONE,), 7.0, dtype=dtype))
        return self.wide[-1][RED_ZONE : RED_ZONE + n].view(shape).fill_(fill)

    def check(self) -> None:
        for wide in self.wide:
            assert (wide[:RED_ZONE] == 7).all(), "written before a result"
            assert (wide[-RED_ZONE:] == 7).all(), "written behind a result"
