"""One training step on ever longer sequences: where naive logits stop fitting in memory, and the fused head goes on.

    python benchmarks/long_context_training.py                       # as far as memory and --minutes go
    python benchmarks/long_context_training.py --tokens 8192 32768 65536 131072 --minutes 60

A small Llama (float32 weights, bfloat16 autocast, activation checkpointing on every layer) takes one InfoPO step on a
pair of sequences; `--tokens` counts both. Each case runs in a fresh process, whose peak memory is its resident set (on
a GPU: the allocator's). A case that would not fit is not started: its row says what it would take, and the plot shows
it hollow, as a model (bytes per token from the measured cases). A failure is a row, not a crash.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from infopo_kernels.training.memory import peak_mib, present_mib, reset_peak

WAYS = ("fused", "naive")
_MIB = 1 << 20


def step(way: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds and peak memory beyond the model and its gradients of one step, in this process."""
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

    def one(tokens: int) -> None:
        ids = torch.randint(args.vocabulary, (2, tokens // 2), device=device)
        with torch.autocast(device.type, torch.bfloat16):
            if way == "fused":
                loss = model(ids, labels=ids, infopo=InfoPOOptions(), use_cache=False).loss
            else:
                logits = model(ids, use_cache=False).logits[:, :-1].float()
                logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1).sum(-1)
                loss = infopo_loss(*logps.chunk(2)).loss
        loss.backward()

    one(64)  # brings in libraries, threads and gradients
    before = present_mib(device)
    reset_peak(device)
    start = time.perf_counter()
    one(args.case)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {"seconds": time.perf_counter() - start, "peak_mib": peak_mib(device) - before}


def memory_limit_mib(args: argparse.Namespace) -> float:
    """What a case may take: --memory-gib, or what is free, with a tenth left to others."""
    device = torch.device(args.device)
    if args.memory_gib is not None:
        return float(args.memory_gib * 1024)
    if device.type == "cuda":
        return 0.9 * torch.cuda.mem_get_info(device)[0] / _MIB
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 0.9 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 1024


def measure(way: str, tokens: int, rows: list[dict[str, Any]], args: argparse.Namespace, left: float) -> dict[str, Any]:
    """One row: measured, or why not and what it would take."""
    row: dict[str, Any] = {"way": way, "tokens": tokens}
    known = [r for r in rows if r["way"] == way and r.get("peak_mib") is not None]
    if known:
        last = known[-1]
        factor = tokens / last["tokens"]
        needed = last["peak_mib"] * factor  # linear, since activations and logits are
        least = last["seconds"] * factor  # attention is quadratic, the rest linear; a timeout ends what takes longer
        if needed > args.limit_mib:
            return {**row, "modelled_peak_mib": needed, "reason": "would not fit in the memory that it may take"}
        if least > left:
            return {**row, "modelled_peak_mib": needed, "reason": "would take longer than the time that is left"}
    command = [sys.executable, __file__, "--case", str(tokens), "--way", way, "--device", args.device]
    for name in ("hidden", "layers", "vocabulary"):
        command += [f"--{name}", str(getattr(args, name))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(left, 30), check=False)
    except subprocess.TimeoutExpired:
        return {**row, "reason": "took longer than the time that was left"}
    if done.returncode:
        message = (done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"])[-1]
        return {**row, "reason": message[:200]}
    return {**row, **json.loads(done.stdout.splitlines()[-1])}


def plot(record: dict[str, Any], path: Path) -> None:
    """Peak memory and time per token over the tokens of the step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.8), layout="constrained")
    for way, color in (("fused", "tab:blue"), ("naive", "tab:orange")):
        rows = [r for r in record["rows"] if r["way"] == way]
        measured = [r for r in rows if "peak_mib" in r]
        x = [r["tokens"] for r in measured]
        label = "fused head" if way == "fused" else "naive logits"
        axes[0].plot(x, [r["peak_mib"] / 1024 for r in measured], "o-", color=color, label=label)
        axes[1].plot(x, [1e3 * r["seconds"] / r["tokens"] for r in measured], "o-", color=color, label=label)
        hollow = [r for r in rows if "modelled_peak_mib" in r]
        if hollow:
            axes[0].plot(
                [r["tokens"] for r in hollow], [r["modelled_peak_mib"] / 1024 for r in hollow], "o", color=color,
                fillstyle="none", label=f"{label}, modelled, not run",
            )  # fmt: skip
    axes[0].axhline(record["limit_mib"] / 1024, color="gray", linestyle="--", label="memory that a case may take")
    axes[1].set_ylim(bottom=0)
    for axis, text in ((axes[0], "peak memory beyond model and gradients, GiB"), (axes[1], "time per token, ms")):
        axis.set(xscale="log", xlabel="tokens of the step (a pair of sequences)", ylabel=text)
        ticks = sorted({r["tokens"] for r in record["rows"]})
        axis.set_xticks(ticks, [f"{t // 1024}k" for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    shape = record["shape"]
    figure.suptitle(
        f"One InfoPO step, Llama {shape['layers']} layers x {shape['hidden']}, vocabulary {shape['vocabulary']}, "
        f"activation checkpointing, {record['device']}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def main() -> None:
    """Run the cases, write record and plot, show the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--minutes", type=float, default=5.0, help="for all cases together (default: 5)")
    parser.add_argument("--memory-gib", type=float, help="what a case may take (default: what is free)")
    parser.add_argument("--hidden", type=int, default=128)
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
    from rich.console import Console
    from rich.table import Table

    args.limit_mib = memory_limit_mib(args)
    console, end = Console(width=120), time.perf_counter() + 60 * args.minutes
    rows: list[dict[str, Any]] = []
    for tokens in sorted(args.tokens):
        for way in WAYS:
            rows.append(measure(way, tokens, rows, args, end - time.perf_counter()))
            console.print(f"{tokens} tokens, {way}: {rows[-1]}", highlight=False)
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    record = {
        "rows": rows, "device": name, "limit_mib": args.limit_mib, "torch": torch.__version__,
        "shape": {"hidden": args.hidden, "layers": args.layers, "vocabulary": args.vocabulary},
    }  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    plot(record, args.output.with_suffix(".png"))
    table = Table(title=f"One InfoPO step on {name}")
    for column in ("tokens", "head", "seconds", "peak, MiB", "note"):
        table.add_column(column)
    for row in rows:
        peak = f"{row['peak_mib']:.0f}" if "peak_mib" in row else ""
        modelled = f"modelled {row['modelled_peak_mib']:.0f} MiB; " if "modelled_peak_mib" in row else ""
        seconds = f"{row['seconds']:.1f}" if "seconds" in row else ""
        table.add_row(str(row["tokens"]), row["way"], seconds, peak, modelled + row.get("reason", ""))
    console.print(table)


if __name__ == "__main__":
    main()
