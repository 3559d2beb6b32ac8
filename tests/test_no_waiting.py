"""The host side on tensors without storage, which have no value to read: what would wait for a GPU fails here.

The backend's own part: `test_triton_compile.py`. Copies to a device are seen on a GPU only (`tests/gpu`).
"""

from __future__ import annotations

import pytest
import torch

from infopo_kernels import InfoPO, functional, infopo_loss, linear_infopo_loss
from infopo_kernels.output import PreferenceOutput, TailSummary


def empty(*size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("into", [False, True], ids=["weight.grad", "a buffer"])
def test_loss_from_hidden_states(into: bool, packed: bool, shift: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "_autocast", lambda *tensors: tensors)  # which does not know these tensors
    hidden, weight = (empty(*s, dtype=torch.float32).requires_grad_() for s in ((4, 9, 8), (50, 8)))
    labels, layout = empty(4, 9, dtype=torch.int64), {}
    rows = hidden, labels
    if packed:
        rows = hidden.flatten(0, 1), labels.flatten()
        layout = {"cu_seqlens": empty(5, dtype=torch.int32), "is_chosen": empty(4, dtype=torch.bool)}
    layout |= {"grad_weight_into": empty(50, 8, dtype=torch.float32)} if into else {}
    out = linear_infopo_loss(rows[0], weight, rows[1], ref_logps=empty(4), shift=shift, **layout)
    assert out.loss.device.type == "meta"


def test_loss_from_log_probabilities() -> None:
    lengths = {f"{half}_lengths": empty(3, dtype=torch.int64) for half in ("chosen", "rejected")}
    assert infopo_loss(empty(3), empty(3), average=True, sft_weight=0.1, **lengths).loss.device.type == "meta"


@pytest.mark.parametrize("tail", [None, TailSummary(empty(), empty(), empty())], ids=["exact", "pooled"])
def test_metrics_of_the_trainers(tail: TailSummary | None) -> None:
    step = pytest.importorskip("infopo_kernels.integrations.step")
    S, numbers = 6, [empty(6) for _ in range(4)]
    out = PreferenceOutput(
        empty(),
        empty(),
        *numbers,
        empty(S, dtype=torch.int64),
        empty(S, dtype=torch.bool),
        chosen_reference_skipped=False,
        tail=tail,
    )
    assert step.metric_sums(out, InfoPO(max_log_weight=1.0)).shape == (20,)


def test_reading_a_value_fails_here() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool((empty(3) < 1).any())
