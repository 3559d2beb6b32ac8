"""Whole training steps of SmolLM2-135M, each contender its head in turn, on one model in a fresh process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Final

import torch

from infopo_kernels.bench.batches import CASES, Batch
from infopo_kernels.bench.contenders import CONTENDERS, Contender
from infopo_kernels.bench.isolated import give_back_at_once, in_fresh_process, keep_what_is_freed, settle
from infopo_kernels.bench.plan import DTYPES, Plan
from infopo_kernels.bench.sweeps import Progress
from infopo_kernels.bench.timing import interleave, message
from infopo_kernels.options import IGNORE_INDEX
from infopo_kernels.training.memory import peak_mib, present_mib, reset_peak

# SmolLM2-135M's configuration. Weights are drawn at random: neither time nor memory depends on their values.
_CONFIG: Final = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Training:
    """Steps on two pairs of `length` tokens, a quarter of them prompt, AdamW on every weight."""

    contenders: tuple[str, ...]
    dtype: str
    length: int
    steps: int
    device: str
    threads: int


def _stepper(training: Training) -> Callable[[Contender], float]:
    """A model, its optimiser and a batch: a function that makes a step with a contender and returns the loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(training.threads)
    device, case, length = torch.device(training.device), CASES["step"], training.length
    model = LlamaForCausalLM(LlamaConfig(**_CONFIG)).to(device, DTYPES[training.dtype])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    ids = torch.randint(_CONFIG["vocab_size"], (4, length), device=device)
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE_INDEX)], 1)
    labels[:, : length // 4] = IGNORE_INDEX
    bounds = torch.arange(5, device=device) * length

    def step(contender: Contender) -> float:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        loss = contender.loss(Batch(case, hidden, model.lm_head.weight, labels, bounds, 0.1))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _measure(training: Training) -> dict[str, Any]:
    """By contender: two losses, the peak memory of the second step (the first compiles, and makes the optimiser's
    state), and the seconds of further ones; or why there are none."""
    device, step = torch.device(training.device), _stepper(training)
    results: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], float]] = {}
    give_back_at_once()
    for name in training.contenders:
        contender = CONTENDERS[name]
        if reason := contender.unsupported_reason(CASES["step"], device, DTYPES[training.dtype]):
            results[name] = {"skipped": reason}
            continue
        try:
            losses = [step(contender)]
            settle()
            before = present_mib(device)
            reset_peak(device)
            losses.append(step(contender))
        except Exception as error:  # a peer may fail in any way, and that is a row of the table
            results[name] = {"failed": message(error)}
            continue
        results[name] = {"losses": losses, "peak_mib": peak_mib(device) - before}
        calls[name] = partial(step, contender)
    keep_what_is_freed()
    # A step ends with its loss on the host, which waits for a device.
    for name, each in interleave(calls, training.steps, float("inf"), lambda: None).items():
        results[name] |= {"seconds": median(each), "each": each}
    return results


def training(plan: Plan, progress: Progress) -> list[dict[str, Any]]:
    """Seconds and peak memory (beyond weights and optimiser state) of whole steps."""
    rows = []
    for dtype in plan.training_dtypes:
        progress(f"training: {dtype}")
        steps = Training(
            plan.peers, dtype, plan.training_length, plan.training_steps, plan.device, torch.get_num_threads()
        )
        results = in_fresh_process(_measure, steps, plan.memory_gib, timeout=1200.0)
        rows += [
            {
                "contender": name,
                "dtype": dtype,
                "length": plan.training_length,
                "sequences": 4,
                **(results if "failed" in results else results[name]),
            }
            for name in plan.peers
        ]
    return rows
