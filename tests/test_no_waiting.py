"""The host side on tensors without storage, which have no value to read: what would wait for a GPU fails here.

The backend's own part: `test_triton_compile.py`. Copies to a device are seen on a GPU only (`tests/gpu`).
"""

from __future__ import annotations

import importlib
from pathlib import Path

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


@pytest.mark.parametrize("several", [False, True], ids=["pairs", "several rejected"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_numbers_of_sequences_are_on_the_host(packed: bool, several: bool) -> None:
    """What the trainers ask a collator's batch for; without the collator's numbers it is read from the device."""
    step = pytest.importorskip("infopo_kernels.integrations.step")
    collators = pytest.importorskip("infopo_kernels.integrations.collators")
    features = [{"prompt_ids": [3], "chosen_ids": [4, 5], "rejected_ids": ids} for ids in ([[6], [7, 8]], [[9, 3]])]
    if not several:
        features = [{**feature, "rejected_ids": feature["rejected_ids"][-1]} for feature in features]
    batch = (collators.PackedPreferenceCollator if packed else collators.PreferenceCollator)()(features)
    there = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    S, out = 5 if several else 4, None
    for inputs in (there, step.counted_once(there, unique=1, pairs=1.0)):
        model_inputs, known = step.split_inputs(inputs)
        assert step.number_of_chosen(model_inputs, known) == 2
        half = step.rejected_half(model_inputs, 2)
        assert step.number_of_sequences(half) == S - 2
        assert half["labels"].shape == ((1, 3 * (S - 2) - several) if packed else (S - 2, 3))
        out = PreferenceOutput(
            empty(), empty(), *[empty(S) for _ in range(4)], empty(S, dtype=torch.int64), empty(S, dtype=torch.bool),
            chosen_reference_skipped=False, tail=None,
        )  # fmt: skip
        assert step.metric_sums(out, InfoPO(), model_inputs, known).shape == (20,)
    model_inputs, known = step.split_inputs({k: v for k, v in there.items() if k not in step._HOST_KEYS})
    if packed:
        with pytest.raises(RuntimeError):
            step.rejected_half(model_inputs, 2)
    if several:
        with pytest.raises(RuntimeError):
            step.metric_sums(out, InfoPO(), model_inputs, known)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", ["transformers", "trl", "trl with a router"])
def test_the_loss_of_the_trainers(kind: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`compute_loss` of every step but the first, which reads what it checks. The step reads the loss behind it."""
    checks, fixtures = (
        pytest.importorskip(f"tests.{name}") for name in ("test_integrations_checks", "training_fixtures")
    )
    monkeypatch.setattr(functional, "_autocast", lambda *tensors: tensors)
    if kind.startswith("trl"):
        trl = pytest.importorskip("tests.test_integrations_trl")
        router = {"architecture": "mixtral", "num_local_experts": 4, "output_router_logits": True}
        fixtures.save_tiny_model(tmp_path / "model", **(router if "router" in kind else {}))
        options = trl.config(tmp_path, padding_free=packed)
        trainer = trl.InfoPOTrainer(str(tmp_path / "model"), args=options, train_dataset=trl.dataset())
    else:
        from infopo_kernels.integrations.collators import PackedPreferenceCollator

        given = {"data_collator": PackedPreferenceCollator()} if packed else {}
        trainer = checks.trainer(tmp_path, ref_model=fixtures.tiny_model(), **given)
    models = trainer.model, trainer.ref_model
    for model in models:
        model.set_attn_implementation("eager")  # the default reads the mask
        model.set_experts_implementation("batched_mm")  # the default takes no float32 without storage
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch)
    # Transformers reads from positions whether sequences are packed. What it finds makes no difference here.
    masks = importlib.import_module("transformers.masking_utils")
    monkeypatch.setattr(masks, "find_packed_sequence_indices", lambda positions: None)
    for model in models:
        model.to("meta")
    there = {key: value.to("meta") if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    assert trainer.compute_loss(trainer.model, there).device.type == "meta"


def test_reading_a_value_fails_here() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool((empty(3) < 1).any())
