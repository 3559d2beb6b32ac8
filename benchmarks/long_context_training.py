"""One training step on ever longer sequences: where naive logits stop fitting in memory, and the fused head goes on.

    python benchmarks/long_context_training.py                                   # every case, up to 128k tokens
    python benchmarks/long_context_training.py --tokens 131072 --ways fused      # a part; the record keeps the others

A small Llama (activation checkpointing on every layer; float32, on a GPU bfloat16 autocast) takes one InfoPO step on a
pair of sequences; `--tokens` counts both. Each case runs in a fresh process that may take `--memory-gib` beyond the
model and its gradients, enforced by the system (RLIMIT_DATA; on a GPU the allocator's share): a case that needs more
really fails, and its row says what it had allocated and asked for then. Peak memory of the others is the resident set's
(on a GPU the allocator's).
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from infopo_kernels.bench.environment import environment
from infopo_kernels.training.memory import peak_mib, present_mib, reset_peak

WAYS = ("fused", "naive")
_MIB = 1 << 20


_UNITS = {"bytes": 1 / _MIB, "MiB": 1, "GiB": 1024}


def address_space_mib(name: str) -> float:
    """Of this process, touched or not: VmData (private data, what the limit counts), VmSize (all), VmPeak."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name + ":")) / 1024


def limit_memory(device: torch.device, gib: float) -> None:
    """Let this process take `gib` more than it has."""
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        share = (torch.cuda.memory_reserved(device) + gib * 2**30) / whole
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
    else:
        most = int((address_space_mib("VmData") + 1024 * gib) * _MIB)
        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))


def step(way: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory beyond the model and its gradients of one step, in this process; or how it failed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from infopo_kernels import InfoPOOptions, infopo_loss
    from infopo_kernels.integrations.transformers import attach_linear_logps

    device = torch.device(args.device)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64, num_key_value_heads=args.hidden // 64,
        max_position_embeddings=args.case, tie_word_embeddings=True, attn_implementation="sdpa",
    )  # fmt: skip
    model = attach_linear_logps(LlamaForCausalLM(config).to(device).train())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def one(tokens: int) -> float:
        ids = torch.randint(args.vocabulary, (2, tokens // 2), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            if way == "fused":
                loss = model(ids, labels=ids, infopo=InfoPOOptions(beta=0.01), use_cache=False).loss
            else:
                logits = model(ids, use_cache=False).logits[:, :-1].float()
                logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1).sum(-1)
                loss = infopo_loss(*logps.chunk(2), beta=0.01).loss
        loss.backward()
        return float(loss.detach())

    one(64)  # brings in libraries, threads and gradients
    before = present_mib(device)
    mapped = address_space_mib("VmSize") if device.type == "cpu" else before
    limit_memory(device, args.memory_gib)
    reset_peak(device)
    start = time.perf_counter()
    try:
        loss = one(args.case)
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        message = " ".join(str(error).split())
        asked = re.search(r"allocate ([\d.]+) (bytes|MiB|GiB)", message)
        return {
            "failed": message[:300], "seconds": time.perf_counter() - start,
            # What failed has let go of its own by now: the peak of what was mapped, touched or not.
            "held_mib": (address_space_mib("VmPeak") if device.type == "cpu" else peak_mib(device)) - mapped,
            "asked_mib": float(asked[1]) * _UNITS[asked[2]] if asked else None,
        }  # fmt: skip
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {"seconds": time.perf_counter() - start, "peak_mib": peak_mib(device) - before, "loss": loss}


def measure(way: str, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """The row of a case, from a process of its own."""
    command = [sys.executable, __file__, "--case", str(tokens), "--way", way, "--device", args.device]
    for name in ("hidden", "layers", "vocabulary", "memory_gib"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    row: dict[str, Any] = {"way": way, "tokens": tokens}
    if done.returncode:
        message = (done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"])[-1]
        return {**row, "failed": message[:300], "held_mib": None, "asked_mib": None}
    return {**row, **json.loads(done.stdout.splitlines()[-1])}


def plot(record: dict[str, Any], path: Path) -> None:
    """Peak memory and time per token over the tokens of the step; a cross is what a failed case held and asked for."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.8), layout="constrained")
    for way, color, label in (("fused", "tab:blue", "fused head"), ("naive", "tab:orange", "naive logits")):
        rows = [r for r in record["rows"] if r["way"] == way]
        measured = [r for r in rows if "peak_mib" in r]
        x = [r["tokens"] for r in measured]
        axes[0].plot(x, [r["peak_mib"] / 1024 for r in measured], "o-", color=color, label=label)
        axes[1].plot(x, [1e3 * r["seconds"] / r["tokens"] for r in measured], "o-", color=color, label=label)
        if failed := [r for r in rows if r.get("asked_mib")]:
            axes[0].plot(
                [r["tokens"] for r in failed], [(r["held_mib"] + r["asked_mib"]) / 1024 for r in failed],
                "x", color=color, markersize=9, markeredgewidth=2, label=f"{label}: failed, held + asked for",
            )  # fmt: skip
    axes[0].axhline(record["memory_gib"], color="gray", linestyle="--", label=f"limit, {record['memory_gib']:g} GiB")
    axes[1].set_ylim(bottom=0)
    for axis, text in ((axes[0], "peak memory beyond model and gradients, GiB"), (axes[1], "time per token, ms")):
        axis.set(xscale="log", xlabel="tokens of the step (a pair of sequences)", ylabel=text)
        ticks = sorted({r["tokens"] for r in record["rows"]})
        axis.set_xticks(ticks, [f"{t // 1024}k" for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_formatter("{x:g}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    shape, machine = record["shape"], record["machine"]
    name = machine.get("gpu") or f"CPU, {machine['threads']} threads"
    figure.suptitle(
        f"One InfoPO step, Llama {shape['layers']} layers x {shape['hidden']}, vocabulary {shape['vocabulary']}, "
        f"activation checkpointing, {name}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def show(record: dict[str, Any], console: Console) -> None:
    """The rows as a table."""
    table = Table(title=f"One InfoPO step, {record['memory_gib']:g} GiB beyond model and gradients")
    for column in ("tokens", "head", "seconds", "peak, MiB", "note"):
        table.add_column(column, justify="left" if column in ("head", "note") else "right")
    for row in record["rows"]:
        peak = f"{row['peak_mib']:.0f}" if "peak_mib" in row else ""
        note = row.get("failed", "")
        if row.get("asked_mib"):
            note = f"failed: held {row['held_mib']:.0f} MiB, asked for {row['asked_mib']:.0f} more"
        table.add_row(str(row["tokens"]), row["way"], f"{row.get('seconds', 0):.1f}", peak, note)
    console.print(table)


def main() -> None:
    """Run the cases, write record and plot, show the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS))
    parser.add_argument("--memory-gib", type=float, default=16.0, help="beyond model and gradients (default: 16)")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/long_context_training.json"))
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(step(args.way, args)))
        return
    about = {
        "machine": environment(args.device),
        "memory_gib": args.memory_gib,
        "shape": {"hidden": args.hidden, "layers": args.layers, "vocabulary": args.vocabulary},
    }
    record = json.loads(args.output.read_text()) if args.output.exists() else {"rows": []}
    cases = [(tokens, way) for tokens in args.tokens for way in args.ways]
    alike = all(record.get(key) == value for key, value in about.items())
    kept = [r for r in record["rows"] if alike and (r["tokens"], r["way"]) not in cases]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    console = Console(width=120)
    for tokens, way in cases:
        kept.append(measure(way, tokens, args))
        console.print(f"{tokens} tokens, {way}: {kept[-1]}", highlight=False)
        record = {**about, "rows": sorted(kept, key=lambda r: (r["tokens"], r["way"]))}
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    plot(record, args.output.with_suffix(".png"))
    show(record, console)


if __name__ == "__main__":
    main()
