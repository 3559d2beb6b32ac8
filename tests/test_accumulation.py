"""k accumulated micro-batches give the step of one batch, under every release of transformers that is claimed.

SGD without clipping: the change of the weights is the gradient, so that a factor k cannot hide.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from examples.train_transformers import InfoPOOnTrainer  # noqa: E402
from infopo_kernels import DPO, InfoPO  # noqa: E402
from infopo_kernels.integrations.collators import PreferenceCollator  # noqa: E402
from infopo_kernels.integrations.trainer import PreferenceTrainer  # noqa: E402
from infopo_kernels.integrations.transformers import attach_linear_logps  # noqa: E402
from tests.training_fixtures import tiny_model  # noqa: E402

PAIRS = [
    {
        "prompt_ids": [5, 6], "chosen_ids": [7, 8, 9 + i], "rejected_ids": [10 + i, 11],
        "ref_chosen_logps": -16.0, "ref_rejected_logps": -11.0,
    }
    for i in range(4)
]  # fmt: skip


def own_trainer(model: Any, arguments: Any, **options: Any) -> Any:
    """The example's trainer, which a user copies."""
    return InfoPOOnTrainer(attach_linear_logps(model), arguments, **options)


def dpo_trainer(model: Any, arguments: Any, **options: Any) -> Any:
    return PreferenceTrainer(model, arguments, infopo=DPO(beta=0.1), **options)


def infopo_trainer(model: Any, arguments: Any, **options: Any) -> Any:
    return PreferenceTrainer(model, arguments, infopo=InfoPO(beta=0.1), **options)


@pytest.mark.parametrize("make", [infopo_trainer, dpo_trainer])
def test_a_loss_that_would_be_divided_twice_is_refused(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers 5.2 to 5.5 have it: its plugin tells Accelerate the number of steps that Trainer divides by."""
    plugin = transformers.trainer.GradientAccumulationPlugin
    monkeypatch.setattr(
        transformers.trainer, "GradientAccumulationPlugin", lambda **options: plugin(**{**options, "num_steps": 2})
    )
    arguments = transformers.TrainingArguments(
        str(tmp_path), gradient_accumulation_steps=2, report_to=[], use_cpu=True, remove_unused_columns=False
    )
    with pytest.raises(ValueError, match="gradients would be 2 times too small"):
        make(tiny_model(), arguments, train_dataset=PAIRS, data_collator=PreferenceCollator())


@pytest.mark.parametrize("make", [infopo_trainer, dpo_trainer, own_trainer])
def test_accumulated_micro_batches_are_one_batch(make: Any, tmp_path: Path) -> None:
    changes, losses = [], []
    for accumulate in (1, 2, 4):
        model = tiny_model()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=4 // accumulate, learning_rate=1.0,
            gradient_accumulation_steps=accumulate, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant",
            logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
            remove_unused_columns=False,
        )  # fmt: skip
        run = make(model, arguments, train_dataset=PAIRS, data_collator=PreferenceCollator())
        run.train()
        changes.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
        losses.append(next(entry["loss"] for entry in run.state.log_history if "loss" in entry))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)
    for name, whole in changes[0].items():
        assert whole.abs().max() > 0 or "embed" in name
        for other in changes[1:]:
            torch.testing.assert_close(other[name], whole, rtol=1e-3, atol=1e-6)
