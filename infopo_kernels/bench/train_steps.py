"""Whole training steps of SmolLM2-135M with each contender as its head, each in a process of its own."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import torch

from infopo_kernels.bench.batches import CASES, Batch
from infopo_kernels.bench.contenders import CONTENDERS
from infopo_kernels.bench.isolated import in_fresh_process, settle
from infopo_kernels.bench.plan import DTYPES, Plan
from infopo_kernels.bench.sweeps import Progress
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
    """One contender's steps: two pairs of `length` tokens, a quarter of them prompt, AdamW on every weight."""

    contender: str
    dtype: str
    length: int
    steps: int
    device: str
    threads: int


def _steps(training: Training) -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(training.threads)
    device, case, contender = torch.device(training.device), CASES["step"], CONTENDERS[training.contender]
    if reason := contender.unsupported_reason(case, device, DTYPES[training.dtype]):
        return {"skipped": reason}
    model = LlamaForCausalLM(LlamaConfig(**_CONFIG)).to(device, DTYPES[training.dtype])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    T = training.length
    ids = torch.randint(_CONFIG["vocab_size"], (4, T), device=device)
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE_INDEX)], 1)
    labels[:, : T // 4] = IGNORE_INDEX
    bounds = torch.arange(5, device=device) * T
    seconds, losses = [], []
    before = peak = 0.0
    for step in range(1 + training.steps):
        if step == 1:  # the first one compiles, and makes the optimiser's state
            settle()
            before = present_mib(device)
            reset_peak(device)
        start = time.perf_counter()
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        loss = contender.loss(Batch(case, hidden, model.lm_head.weight, labels, bounds, 0.1))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step:
            seconds.append(time.perf_counter() - start)
        del hidden, loss
    peak = peak_mib(device)
    return {"seconds": median(seconds), "each": seconds, "losses": losses, "peak_mib": peak - before}


def training(plan: Plan, progress: Progress) -> list[dict[str, Any]]:
    """Seconds and peak memory (beyond weights and optimiser state) of whole steps."""
    rows = []
    for dtype in plan.training_dtypes:
        for name in plan.peers:
            progress(f"training: {dtype}, {name}")
            one = Training(name, dtype, plan.training_length, plan.training_steps, plan.device, torch.get_num_threads())
            result = in_fresh_process(_steps, one, plan.memory_gib, timeout=300.0)
            rows.append({"contender": name, "dtype": dtype, "length": plan.training_length, "sequences": 4, **result})
    return rows
