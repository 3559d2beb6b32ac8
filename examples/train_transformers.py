"""InfoPO with transformers' own Trainer: a collator and a compute_loss.

    python examples/train_transformers.py --data pairs.jsonl --model DIR_OR_ID --output out

Without --data and --model: SmolLM2-135M-Instruct on arithmetic word problems.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from infopo_kernels import InfoPOOptions
from infopo_kernels.commands.demo.word_problems import word_problems
from infopo_kernels.commands.smollm2 import smollm2_directory
from infopo_kernels.integrations.collators import PreferenceCollator
from infopo_kernels.integrations.preferences import preference_features, read_preferences
from infopo_kernels.integrations.trainer import compute_infopo_loss
from infopo_kernels.integrations.transformers import attach_linear_logps


class InfoPOOnTrainer(Trainer):
    """The code to add to a Trainer. `infopo_kernels.integrations.trainer.PreferenceTrainer` also adds metrics."""

    options = InfoPOOptions(beta=0.1)
    reference: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # a mean over the pairs of a batch: divided when it is accumulated

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The InfoPO loss of a batch."""
        out = compute_infopo_loss(model, inputs, self.options, ref_model=self.reference)
        return (out.loss, out) if return_outputs else out.loss


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", help="directory or hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--data", type=Path, help="preference pairs, JSONL (default: word problems)")
    parser.add_argument("--output", default="out/train_transformers")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()

    source = args.model or str(smollm2_directory())
    model, reference = (
        attach_linear_logps(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)) for _ in range(2)
    )
    rows = read_preferences(args.data) if args.data else [pair.row() for pair in word_problems(2 * args.steps, seed=0)]
    tokenizer = AutoTokenizer.from_pretrained(source)
    features = preference_features(tokenizer, rows, max_length=512)
    arguments = TrainingArguments(
        args.output, max_steps=args.steps, per_device_train_batch_size=2, learning_rate=1e-5, bf16=True,
        use_cpu=not torch.cuda.is_available(), remove_unused_columns=False, logging_steps=1, report_to=[],
        save_strategy="no",
    )  # fmt: skip
    trainer = InfoPOOnTrainer(
        model, arguments, train_dataset=features, data_collator=PreferenceCollator(pad_token_id=0)
    )
    trainer.reference = reference.eval()
    trainer.train()
    trainer.save_model()
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
