"""`make fuzz` and `make sanitize` in short: their cases run, and a wrong kernel makes them fail."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch

from infopo_kernels.backends.base import Gradients
from infopo_kernels.backends.torch_chunked import TorchBackend
from infopo_kernels.distributed.parallel import Way
from tests import support
from tests.fuzz import cases, sanitize
from tests.fuzz import functions as calls
from tests.fuzz.__main__ import TRITON_EVERY, drawn_from, run

BACKENDS = [name for name in support.CPU_BACKENDS if support.missing(name) is None]
SEEDS = range(240)


@pytest.mark.parametrize("seeds", [SEEDS[first::6] for first in range(6)], ids=lambda seeds: f"from-{seeds[0]}")
def test_random_cases(seeds: range) -> None:
    assert [failure for seed in seeds if (failure := run(seed, BACKENDS)) is not None] == []


def test_triton_has_a_share() -> None:
    """A small one beside other backends, of primitives and of public functions, and all cases if it is alone."""
    taken = [seed for seed in range(6 * TRITON_EVERY) if drawn_from(seed, [*BACKENDS, "triton"]) == ["triton"]]
    assert len(taken) == 6
    assert {seed % 3 for seed in taken} == {0, 1, 2}
    assert drawn_from(taken[0] + 1, [*BACKENDS, "triton"]) == drawn_from(taken[0], BACKENDS) == BACKENDS
    assert all(drawn_from(seed, ["triton"]) == ["triton"] for seed in range(3))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of lanes that Triton masks
def test_cases_of_triton() -> None:
    if (reason := support.missing("triton")) is not None:
        pytest.skip(reason)
    taken = [seed for seed in range(6 * TRITON_EVERY) if drawn_from(seed, [*BACKENDS, "triton"]) == ["triton"]]
    assert [failure for seed in taken if (failure := run(seed, [*BACKENDS, "triton"])) is not None] == []


def test_what_is_drawn() -> None:
    """Every kind of case comes up: thresholds, labels elsewhere, nothing trained, a head that ranks share."""
    primitives = [cases.draw(seed, BACKENDS) for seed in range(300)]
    public = [calls.draw(seed, BACKENDS) for seed in range(300)]
    assert {case.backend for case in primitives} == {call.backend for call in public} == set(BACKENDS)
    assert {case.way for case in primitives if case.threshold > 0} == {"known", "lse", "kept"}
    assert any(case.elsewhere > 0 for case in primitives)
    assert {len(call.trained) for call in public} == {0, 1, 2, 3}
    assert any("tail_threshold" in call.kernel for call in public)
    assert {call.way for call in public} == {None, *get_args(Way)}


def mass_too_large(gradients: Gradients, row: int) -> None:
    assert gradients.tail is not None
    gradients.tail.mass[row] = 0.99


def mass_left_out(gradients: Gradients, row: int) -> None:
    assert gradients.tail is not None
    gradients.tail.mass[row] = torch.nan


def pool_spread_over_too_few_words(gradients: Gradients, row: int) -> None:
    assert gradients.weight is not None
    gradients.weight[: len(gradients.weight) // 2] *= 0.99


@pytest.mark.parametrize("fault", [mass_too_large, mass_left_out, pool_spread_over_too_few_words])
def test_a_wrong_pool_is_found(fault: Callable[[Gradients, int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first case with a threshold that pools much and trains the head."""
    backend = TorchBackend()
    drawn = (cases.draw(seed, ["torch"]) for seed in range(10_000))
    case = next(each for each in drawn if each.threshold > 1e-2 and "w" in each.wanted and each.N > 10 < each.V)
    cases.check(case, backend)

    def spoilt(own: Callable[..., Any], *arguments: Any) -> Any:
        result, gradients = own(*arguments), next(each for each in arguments if isinstance(each, Gradients))
        assert gradients.tail is not None
        fault(gradients, int((~gradients.tail.mass.isnan()).nonzero()[0]))
        return result

    for name in ("logprob_and_grad", "backward"):
        monkeypatch.setattr(backend, name, functools.partial(spoilt, getattr(backend, name)))
    with pytest.raises(AssertionError, match=r"pooled|sum over the vocabulary|mass"):
        cases.check(case, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_calls_of_the_sanitizer(dtype: torch.dtype) -> None:
    """With the extension as it is: a changed op would end `make sanitize` before it has looked at anything."""
    if (reason := support.missing("cpp-portable")) is not None:
        pytest.skip(reason)
    threads = torch.get_num_threads()
    try:
        assert sanitize.run(torch.ops.infopo_kernels_cpp, dtype, *sanitize.SIZES[-1]) > 0
    finally:
        torch.set_num_threads(threads)
