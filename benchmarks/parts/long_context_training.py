"""One training step on sequences of growing length: naive logits no longer fit in memory, the fused head still does.

    python -m benchmarks long-context-training                                   # every case, up to 128k tokens
    python -m benchmarks long-context-training --tokens 131072 --ways fused      # a part; the record keeps the others

A small Llama (activation checkpointing on every layer; float32, on a GPU bfloat16 autocast) takes one InfoPO step on a
pair of sequences; `--tokens` counts both. Each case runs in a fresh process with a limit of `--memory-gib` beyond the
model and its gradients. The system enforces the limit (RLIMIT_DATA; on a GPU the allocator's share). So a case that
needs more really fails; its row gives the memory that it had allocated and the memory that it asked for. The peak
memory of the other cases comes from the resident set (on a GPU from the allocator).
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import plots, records, report
from benchmarks.measure import memory
from benchmarks.measure.environment import environment
from benchmarks.measure.fresh import in_fresh_process
from infopo_kernels import InfoPOOptions, infopo_loss
from infopo_kernels.integrations.transformers import attach_linear_logps

RECORD = "long-context-training"
WAYS = ("fused", "naive")
_UNITS = {"bytes": 1 / memory.MIB, "MiB": 1, "GiB": 1024}


@dataclass(frozen=True)
class Model:
    """The model of the step."""

    hidden: int = 256
    layers: int = 2
    vocabulary: int = 49152


@dataclass(frozen=True)
class Setup:
    """One case."""

    way: str
    tokens: int
    model: Model
    memory_gib: float
    device: str


def step(setup: Setup) -> dict[str, Any]:
    """Run one step in this process: its seconds and its peak memory beyond model and gradients, or how it failed."""
    memory.one_arena()
    device, size = torch.device(setup.device), setup.model
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=4 * size.hidden,
        num_hidden_layers=size.layers, num_attention_heads=size.hidden // 64, num_key_value_heads=size.hidden // 64,
        max_position_embeddings=setup.tokens, tie_word_embeddings=True, attn_implementation="sdpa",
    )  # fmt: skip
    model = attach_linear_logps(LlamaForCausalLM(config).to(device).train())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def one(tokens: int) -> float:
        ids = torch.randint(size.vocabulary, (2, tokens // 2), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            if setup.way == "fused":
                loss = model(ids, labels=ids, infopo=InfoPOOptions(beta=0.01), use_cache=False).loss
            else:
                logits = model(ids, use_cache=False).logits[:, :-1].float()
                logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1).sum(-1)
                loss = infopo_loss(*logps.chunk(2), beta=0.01).loss
        loss.backward()
        return float(loss.detach())

    one(64)  # loads libraries, starts threads, allocates gradients
    mapped = memory.present_mib(device) if device.type == "cuda" else memory.status_mib("VmSize")
    memory.limit(device, setup.memory_gib)
    start = time.perf_counter()
    try:
        use = memory.watch(partial(one, setup.tokens), device)
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        message = " ".join(str(error).split())
        asked = re.search(r"allocate ([\d.]+) (bytes|MiB|GiB)", message)
        # The failed step has freed its memory by now, so this reads the peak of mapped memory, touched or not.
        peak = torch.cuda.max_memory_allocated(device) / memory.MIB if device.type == "cuda" else None
        return {
            "failed": message[:300], "seconds": time.perf_counter() - start,
            "held_mib": (memory.status_mib("VmPeak") if peak is None else peak) - mapped,
            "asked_mib": float(asked[1]) * _UNITS[asked[2]] if asked else None,
        }  # fmt: skip
    return {"seconds": use.seconds, "peak_mib": use.peak_mib, "loss": use.result}


def measure(setup: Setup) -> dict[str, Any]:
    """The row of a case, measured in its own process."""
    row: dict[str, Any] = in_fresh_process(step, setup, timeout=3600.0)
    row.pop("traceback", None)
    return {"way": setup.way, "tokens": setup.tokens, **row}


def table(record: records.Record) -> report.Table:
    """A row for each number of tokens."""
    shape, m = record.settings["shape"], record.machine
    title = (
        f"One InfoPO step, Llama of {shape['layers']} layers, hidden size {shape['hidden']}, vocabulary "
        f"{shape['vocabulary']:,}; limit {record.settings['memory_gib']:g} GiB beyond model and gradients; "
        f"{m.get('gpu', m['cpu'])}, {m['threads']} threads."
    )
    rows = []
    for tokens, group in record.rows.groupby("tokens"):
        cells = [f"{tokens // 1024}k"]
        for way in WAYS:
            found = group[group["way"] == way].to_dict("records")
            if not found:
                cells += ["–", "–"]
            elif isinstance(found[0]["why"], str):
                row = found[0]
                held = f"held {row['held_mib']:,.0f}, asked for {row['asked_mib']:,.0f} more"
                cells += ["", f"failed: {held}" if row.get("asked_mib", 0) > 0 else row["why"]]
            else:
                cells += [f"{found[0]['seconds']:.1f}", f"{found[0]['peak_mib']:,.0f}"]
        rows.append(cells)
    columns = ["tokens", *(f"{way}, {what}" for way in WAYS for what in ("s", "peak MiB"))]
    return report.Table(RECORD, title, columns, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases, write record and plot, show the table."""
    parser = records.parser(RECORD, __doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS))
    parser.add_argument("--memory-gib", type=float, default=16.0, help="beyond model and gradients (default: 16)")
    for name, value in asdict(Model()).items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"of the model (default: {value})")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    model, machine, console = (
        Model(args.hidden, args.layers, args.vocabulary),
        environment(args.device),
        report.console(),
    )
    settings = {"memory_gib": args.memory_gib, "shape": asdict(model)}
    for tokens in args.tokens:
        for way in args.ways:
            row = measure(Setup(way, tokens, model, args.memory_gib, args.device))
            console.print(f"{tokens} tokens, {way}: {row}", highlight=False)
            record = records.merge(args.output, RECORD, machine, [row], by=("tokens", "way"), **settings)
    report.render(console, [table(record)])
    plots.draw({RECORD: record}, args.output / machine["processor"])
    return 0
