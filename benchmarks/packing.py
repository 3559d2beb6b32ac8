"""What packs and shared prompts save: tokens, and time of forward and backward, on SmolLM2-135M-Instruct.

    python benchmarks/packing.py --pairs 4 --repeats 5

The demo's word problems, float32, the same pairs in every layout; repetitions are interleaved, times are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from infopo_kernels import InfoPOOptions
from infopo_kernels.bench.environment import environment
from infopo_kernels.integrations.collators import PackedPreferenceCollator, PreferenceCollator, preference_features
from infopo_kernels.integrations.transformers import attach_linear_logps
from infopo_kernels.commands.smollm2 import smollm2_directory
from infopo_kernels.commands.demo.word_problems import word_problems


def main() -> None:
    """Measure and show."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/packing.json"))
    args = parser.parse_args()
    source = str(smollm2_directory())
    model = attach_linear_logps(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)).train()
    rows = [pair.row() for pair in word_problems(args.pairs, seed=0)]
    features = preference_features(AutoTokenizer.from_pretrained(source), rows)
    layouts: dict[str, Any] = {
        "padded": PreferenceCollator()(features),
        "packed": PackedPreferenceCollator()(features),
        "packed, shared prompts": PackedPreferenceCollator(share_prompt=True)(features),
    }
    seconds: dict[str, list[float]] = {name: [] for name in layouts}
    losses: dict[str, float] = {}
    for repeat in range(args.repeats + 1):
        for name, batch in layouts.items():
            start = time.perf_counter()
            loss = model(**batch, infopo=InfoPOOptions(beta=0.01)).loss
            loss.backward()
            if repeat:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
            losses[name] = float(loss.detach())
    table = Table(title=f"{args.pairs} pairs, forward and backward, {torch.get_num_threads()} threads, median")
    for column in ("layout", "tokens", "seconds", "spread", "loss"):
        table.add_column(column, justify="left" if column == "layout" else "right")
    for name, batch in layouts.items():
        times = seconds[name]
        spread = f"{min(times):.2f} to {max(times):.2f}"
        tokens = str(batch["input_ids"].numel())
        table.add_row(name, tokens, f"{statistics.median(times):.2f}", spread, f"{losses[name]:.5f}")
    Console(width=100).print(table)
    record = {
        "machine": environment("cpu"),
        "pairs": args.pairs,
        "layouts": [
            {"layout": name, "tokens": batch["input_ids"].numel(), "seconds": seconds[name], "loss": losses[name]}
            for name, batch in layouts.items()
        ],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
