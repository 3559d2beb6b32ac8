"""Whole training steps of SmolLM2-135M on one model in a fresh process. The contenders take turns as its head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Final

import torch

from benchmarks.cases import CASES, DTYPES, Batch
from benchmarks.contenders import CONTENDERS, Contender
from benchmarks.measure.fresh import in_fresh_process
from benchmarks.measure.memory import keep_what_is_freed, watch
from benchmarks.measure.timing import interleave, message
from benchmarks.plan import Plan, Progress
from infopo_kernels.options import IGNORE_INDEX

# The configuration of SmolLM2-135M. Weights are random: time and memory do not depend on their values.
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
    # Imported here: the other parts run without transformers, and its import takes seconds.
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
    """For each contender: two losses, the peak memory of the second step (the first step compiles, and allocates the
    optimiser's state), and the seconds of more steps; or the reason why there are none."""
    device, step = torch.device(training.device), _stepper(training)
    results: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], float]] = {}
    for name in training.contenders:
        contender = CONTENDERS[name]
        if reason := contender.unsupported_reason(CASES["step"], device, DTYPES[training.dtype]):
            results[name] = {"skipped": reason}
            continue
        try:
            first, use = step(contender), watch(partial(step, contender), device)
        except Exception as error:  # another implementation may fail in any way; the failure is a row
            results[name] = {"failed": message(error)}
            continue
        results[name] = {"losses": [first, use.result], "peak_mib": use.peak_mib}
        calls[name] = partial(step, contender)
    keep_what_is_freed()
    for name, each in interleave(calls, training.steps, float("inf"), device).items():
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
        results = in_fresh_process(_measure, steps, memory_gib=plan.memory_gib, timeout=1200.0)
        if "failed" in results:
            results = {name: {"failed": results["failed"]} for name in plan.peers}
        about = {"dtype": dtype, "length": plan.training_length, "sequences": 4}
        rows += [{"contender": name, **about, **results[name]} for name in plan.peers]
    return rows
