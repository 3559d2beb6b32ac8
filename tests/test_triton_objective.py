"""InfoPO in two launches, interpreted, against the same objective in plain PyTorch, and bounds that nobody checked."""

from __future__ import annotations

import pytest
import torch

from tests import triton_support as ts

# isort: split
# Triton is imported by the module above.

from infopo_kernels import packing
from infopo_kernels.objectives import Evaluation, InfoPO, Sequences, evaluate
from infopo_kernels.packing import Rows

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

OPTIONS = [
    InfoPO(),
    InfoPO(beta=0.3, offset=0.0, max_log_weight=-1.0, min_log_weight=-3.0, sft_weight=0.5, average=True),
    InfoPO(beta=2.0, max_log_weight=1.0),
]
LENGTHS = [5, 1, 4300, 17, 3]


def batch(int_type: torch.dtype = torch.int64, weights: bool = False) -> tuple[torch.Tensor, Rows, Sequences]:
    """Unequal lengths, kinds in any order."""
    g = torch.Generator().manual_seed(1)
    n, s = sum(LENGTHS), len(LENGTHS)
    cu = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)]).to(int_type)
    labels = torch.randint(0, 50, (n,), generator=g)
    labels[torch.rand(n, generator=g) < 0.4] = -100
    labels[5] = labels[-1] = labels[4310] = 3
    logp = torch.where(labels == -100, 0.0, -torch.rand(n, generator=g))
    segments = packing.row_segments(cu, n)
    rows = Rows(torch.empty(n, 1), labels, cu, segments)
    chosen = torch.tensor([True, False, True, False, False])
    counts = packing.sequence_sums(labels != -100, segments, s)
    ref = -torch.rand(s, generator=g).double() * torch.tensor([2, 0.5, 1300, 9, 1])
    u = torch.rand(s, generator=g).double() if weights else None
    return logp, rows, Sequences(counts, chosen, ref, 2.5, u)


def run(objective: InfoPO, logp: torch.Tensor, rows: Rows, sequences: Sequences) -> Evaluation:
    with ts.checked_addresses(), ts.FreshMemory():
        result = ts.backend().objective(objective, logp, rows, sequences)
    assert result is not None
    return result


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("int_type", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("objective", OPTIONS, ids=range(len(OPTIONS)))
def test_as_in_plain_pytorch(objective: InfoPO, int_type: torch.dtype, weights: bool) -> None:
    arguments = batch(int_type, weights)
    got, truth = run(objective, *arguments), evaluate(objective, *arguments)
    for name, value, exact in zip(truth._fields, got, truth, strict=True):
        assert value.dtype == exact.dtype, name
        torch.testing.assert_close(value, exact, rtol=1e-12, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_a_sequence_without_a_scored_token_is_nan_and_no_other() -> None:
    logp, rows, sequences = batch()
    rows.labels[4306:4323] = -100
    sequences.counts[3] = 0
    got, truth = run(InfoPO(), logp, rows, sequences), evaluate(InfoPO(), logp, rows, sequences)
    for value, exact in zip(got, truth, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-12, atol=0, equal_nan=True)
    assert got.loss.isnan()
    assert got.logps.isnan().tolist() == [False, False, False, True, False]
    assert not got.row_weight.isnan().any()


def test_more_sequences_than_a_step_of_the_last_program() -> None:
    s = 600
    cu, labels = torch.arange(s + 1) * 2, torch.ones(2 * s, dtype=torch.int64)
    logp = -torch.rand(2 * s, generator=torch.Generator().manual_seed(2))
    rows = Rows(torch.empty(2 * s, 1), labels, cu, packing.row_segments(cu, 2 * s))
    sequences = Sequences(torch.full((s,), 2), torch.arange(s) % 3 == 0, torch.zeros(s).double(), 300.0)
    got, truth = (
        run(InfoPO(sft_weight=0.2), logp, rows, sequences),
        evaluate(InfoPO(sft_weight=0.2), logp, rows, sequences),
    )
    for value, exact in zip(got, truth, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-12, atol=0)


BAD_BOUNDS = {
    "empty sequence": [0, 3, 3, 20],
    "beyond the rows": [0, 7, 19, 64],
    "decreasing": [0, 9, 4, 20],
    "negative": [-5, 4, 12, 20],
    "starts late": [2, 4, 12, 20],
    "ends early": [0, 4, 12, 19],
    "beyond 32 bits": [0, 4, 12, (1 << 32) + 20],
}


@pytest.mark.parametrize("cu", BAD_BOUNDS.values(), ids=BAD_BOUNDS)
def test_wrong_bounds_are_nan_and_stay_inside(cu: list[int]) -> None:
    """The kernel's own sequences and those of plain PyTorch: nothing is indexed out of range, and the loss is NaN."""
    logp, labels, bounds = -torch.rand(20), torch.arange(20), torch.tensor(cu)
    segments = packing.row_segments(bounds, 20)
    assert segments.min() >= 0
    assert segments.max() < 3
    assert not packing.bounds_hold(bounds, 20)
    sequences = Sequences(torch.full((3,), 6), torch.tensor([True, False, True]), torch.zeros(3).double(), 1.0)
    got = run(InfoPO(), logp, Rows(torch.empty(20, 1), labels, bounds, segments), sequences)
    assert got.loss.isnan()


def test_bounds_that_hold() -> None:
    assert packing.bounds_hold(torch.tensor([0, 3, 9]), 9)
    assert packing.bounds_hold(torch.tensor([0, 9], dtype=torch.int32), 9)


def test_nan_and_infinity_stay() -> None:
    logp, labels = torch.tensor([-1.0, float("nan"), -2.0, -3.0]), torch.arange(4)
    cu, chosen = torch.tensor([0, 2, 4]), torch.tensor([False, False])
    rows = Rows(torch.empty(4, 1), labels, cu, packing.row_segments(cu, 4))
    sequences = Sequences(torch.full((2,), 2), chosen, torch.tensor([0.0, -1e9]).double(), 1.0)
    got = run(InfoPO(max_log_weight=0.0, min_log_weight=-1.0), logp, rows, sequences)
    assert got.loss.isnan()
    assert got.weights[0].isnan()
    assert got.row_weight[:2].isnan().all()
    assert got.weights[1] == pytest.approx(0.1)


def test_two_runs_are_bitwise_equal() -> None:
    first, second = (run(InfoPO(average=True), *batch()) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
