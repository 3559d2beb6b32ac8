"""InfoPO with TRL: SmolLM2-135M-Instruct on arithmetic word problems.

    python examples/train_trl.py                       # full tuning
    python examples/train_trl.py --lora-rank 16        # LoRA; the model without its adapter is the reference

A script that trains with DPO needs two changes: InfoPOConfig instead of DPOConfig, InfoPOTrainer instead of DPOTrainer.
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig

from infopo_kernels.commands.demo.word_problems import word_problems
from infopo_kernels.commands.smollm2 import smollm2_directory
from infopo_kernels.integrations.trl import InfoPOConfig, InfoPOTrainer


def main() -> None:
    """Train, evaluate before and after, save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", help="directory or hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--output", default="out/train_trl")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lora-rank", type=int)
    args = parser.parse_args()

    pairs = Dataset.from_list([pair.row() for pair in word_problems(4 * args.steps + 16, seed=0)])
    split = pairs.train_test_split(test_size=16, seed=0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=args.lora_rank or 16, target_modules="all-linear")
    config = InfoPOConfig(
        args.output,
        beta=0.1,
        learning_rate=1e-5 if args.lora_rank is None else 1e-4,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        lr_scheduler_type="linear",
        warmup_steps=2,
        max_length=512,
        padding_free=True,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),  # TRL's default is True; without bfloat16 units a CPU is faster in float32
        precompute_ref_log_probs=True,
        logging_steps=1,
        report_to=[],
    )
    trainer = InfoPOTrainer(
        args.model or str(smollm2_directory()),
        args=config,
        train_dataset=split["train"],
        eval_dataset=split["test"],
        peft_config=lora if args.lora_rank is not None else None,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for name in ("logps/chosen", "logps/rejected", "rewards/accuracies", "mi_lower_bound"):
        print(f"{name:>20}  {before['eval_' + name]:9.3f} -> {after['eval_' + name]:9.3f}")
    trainer.save_model()


if __name__ == "__main__":
    main()
