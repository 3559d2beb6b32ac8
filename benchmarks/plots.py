"""Plots of the records. What is plotted, on what, with which sizes, limits and units stands in each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pandas as pd

from benchmarks import style
from benchmarks.cases import MAIN_SHAPE
from benchmarks.contenders import CONTENDERS
from benchmarks.records import Record, Records


def _machine(record: Record) -> str:
    info = record.machine
    name = info.get("gpu") or info["cpu"].replace("family/model/stepping ", "")
    return f"{name}, {info['threads']} threads"


def _names(rows: pd.DataFrame, figure: str) -> list[str]:
    """Contenders that have a figure or failed, in the order of the table of contenders."""
    there = set(rows[rows[figure].notna() | _failed(rows)]["contender"])
    return [name for name in CONTENDERS if name in there]


def _failed(rows: pd.DataFrame) -> pd.Series:
    return rows["why"].str.startswith("failed", na=False)


def _bars(axes: Any, rows: pd.DataFrame, by: str, figure: str) -> None:
    groups = list(dict.fromkeys(rows[by]))
    cells = rows.set_index(["contender", by])
    names = _names(rows, figure)
    values: dict[str, list[float | None]] = {}
    why: dict[tuple[str, int], str] = {}
    for name in names:
        own = cells.loc[name].reindex(groups)
        values[name] = [None if pd.isna(value) else float(value) for value in own[figure]]
        why |= {(name, i): text.partition(":")[0] for i, text in enumerate(own["why"]) if isinstance(text, str)}
    style.bars(axes, [str(group) for group in groups], values, why)


def _lines(axes: Any, rows: pd.DataFrame, x: str, figure: str) -> None:
    for name in _names(rows, figure):
        own = rows[(rows["contender"] == name) & rows[figure].notna()]
        if len(own):
            axes.plot(own[x], own[figure], **style.line(name))
    failed = rows[_failed(rows)]
    style.doubling(axes, [*rows[rows[figure].notna()][x], *failed[x]])
    style.failures(axes, zip(failed[x], failed["contender"], strict=True))


def _speed(record: Record, path: Path) -> None:
    rows = record.rows.assign(ratio=record.rows["seconds"] / record.rows["floor"])
    shape = MAIN_SHAPE if MAIN_SHAPE in set(rows["shape"]) else rows["shape"].iloc[0]
    rows = rows[rows["shape"] == shape]
    one, dtypes = rows.iloc[0], list(dict.fromkeys(rows["dtype"]))
    title = (
        f"{shape}, {2 * one['pairs'] * one['length']:,} tokens: time over that of the bare matrix products, lower is "
        f"better\n{_machine(record)}"
    )
    with style.drawing(path, title, 1, len(dtypes), height=3.2) as (figure, axes):
        for ax, dtype in zip(axes[:, 0], dtypes, strict=True):
            _bars(ax, rows[rows["dtype"] == dtype], "case", "ratio")
            ax.axhline(1.0, color="black", linewidth=1, linestyle="--", label="bare products")
            ax.set(ylabel="time / bare products", title=dtype)
        style.legend(figure, *axes[:, 0], columns=8)


def _memory(record: Record, path: Path) -> None:
    sweeps = {"tokens": "tokens in the batch", "vocab": "vocabulary (words)", "pairs": "pairs"}
    rows = record.rows
    narrow = rows[rows["sweep"] == "tokens"].iloc[0]
    title = (
        f"Peak memory of a step beyond inputs and gradients: {narrow['tokens']} tokens in 2 pairs, vocabulary "
        f"{narrow['vocab']:,}, and one of these growing;\nhidden size {narrow['hidden']}, {narrow['dtype']}, limit "
        f"{record.settings['memory_gib']:g} GiB; {_machine(record)}"
    )
    with style.drawing(path, title, 3, sharey=True) as (figure, axes):
        for ax, (column, label) in zip(axes[0], sweeps.items(), strict=True):
            own = rows[rows["sweep"] == {"vocab": "vocabulary"}.get(column, column)]
            _lines(ax, own.assign(peak=own["peak_mib"].clip(lower=1.0)), column, "peak")
            style.logarithmic(ax)
            ax.set_xlabel(label)
        axes[0, 0].set_ylabel("peak memory (MiB)")
        style.legend(figure, *axes[0])


def _long(record: Record, path: Path) -> None:
    rows, one, limit = record.rows, record.rows.iloc[0], record.settings["memory_gib"]
    rows = rows.assign(microseconds=rows["seconds"] / rows["tokens"] * 1e6, peak=rows["peak_mib"].clip(lower=1.0))
    late = rows["why"].str.extract(r"not run: .* limit (\d+ s)")[0].dropna()
    title = (
        f"Forward and backward of one pair: hidden size {one['hidden']}, vocabulary {one['vocab']:,}, {one['dtype']}, "
        f"limit {limit:g} GiB;\n{f'longer ones were not run: over {late.iloc[0]} expected; ' if len(late) else ''}"
        f"{_machine(record)}"
    )
    with style.drawing(path, title, 2, height=4.4) as (figure, axes):
        left, right = axes[0]
        _lines(left, rows, "tokens", "microseconds")
        _lines(right, rows, "tokens", "peak")
        right.axhline(1024 * limit, color="black", linewidth=1, linestyle="--", label=f"limit, {limit:g} GiB")
        style.logarithmic(right)
        left.set_ylim(bottom=0)
        left.set(xlabel="tokens of the pair", ylabel="time per token (µs)")
        right.set(xlabel="tokens of the pair", ylabel="peak beyond inputs and gradients (MiB)")
        style.legend(figure, left, right, columns=8)


def _accuracy(record: Record, path: Path) -> None:
    rows = record.rows.assign(error=record.rows["sequence"].clip(lower=1e-9))
    dtypes = list(dict.fromkeys(rows["dtype"]))
    title = f"{rows['shape'].iloc[0]}: largest error of a sequence log-probability against float64\n{_machine(record)}"
    with style.drawing(path, title, len(dtypes)) as (figure, axes):
        for ax, dtype in zip(axes[0], dtypes, strict=True):
            _lines(ax, rows[rows["dtype"] == dtype], "length", "error")
            ax.set(yscale="log", xlabel="tokens of the sequence", title=dtype)
        axes[0, 0].set_ylabel("error (nats)")
        style.legend(figure, *axes[0])


def _training(record: Record, path: Path) -> None:
    rows, one = record.rows, record.rows.iloc[0]
    title = (
        f"Whole training steps of {MAIN_SHAPE} (AdamW, all weights), {one['sequences']} sequences of {one['length']} "
        f"tokens;\npeak beyond weights and optimiser state; {_machine(record)}"
    )
    with style.drawing(path, title, 2) as (figure, axes):
        for ax, key, label in (
            (axes[0, 0], "seconds", "one training step (s)"),
            (axes[0, 1], "peak_mib", "peak memory (MiB)"),
        ):
            _bars(ax, rows, "dtype", key)
            ax.set_ylabel(label)
        style.legend(figure, *axes[0])


def _long_training(record: Record, path: Path) -> None:
    """A cross is what a failed case held and asked for."""
    shape, limit, rows = record.settings["shape"], record.settings["memory_gib"], record.rows
    title = (
        f"One InfoPO step: Llama of {shape['layers']} layers, hidden size {shape['hidden']}, vocabulary "
        f"{shape['vocabulary']:,}, activation checkpointing, limit {limit:g} GiB\n{_machine(record)}"
    )
    with style.drawing(path, title, 2, height=4.4) as (figure, axes):
        left, right = axes[0]
        for way, colour, marker, label in (
            ("fused", style.VERMILLION, "o", "fused head"),
            ("naive", style.BLACK, "s", "naive logits"),
        ):
            own = rows[rows["way"] == way].sort_values("tokens")
            measured = own[own["why"].isna()]
            look = {"color": colour, "marker": marker, "label": label}
            left.plot(measured["tokens"], measured["peak_mib"] / 1024, **look)
            right.plot(measured["tokens"], 1e3 * measured["seconds"] / measured["tokens"], **look)
            failed = own[own["why"].notna()]
            if len(failed):
                needed = (failed["held_mib"] + failed["asked_mib"]) / 1024
                cross = {"color": colour, "marker": "x", "linestyle": "none", "markersize": 9, "markeredgewidth": 2}
                left.plot(failed["tokens"], needed, label=f"{label}: failed, held + asked for", **cross)
        left.axhline(limit, color="black", linestyle="--", linewidth=1, label=f"limit, {limit:g} GiB")
        style.logarithmic(left)
        left.set_ylabel("peak beyond model and gradients (GiB)")
        right.set_ylabel("time per token (ms)")
        right.set_ylim(bottom=0)
        for ax in (left, right):
            style.doubling(ax, rows["tokens"])
            ax.set_xlabel("tokens of the step (a pair of sequences)")
        style.legend(figure, left)


_RUNS: Final = {
    "infopo full beta0.1 lr1e-05": (style.BLUE, "-"),
    "infopo full beta0.1 lr5e-05": (style.GREEN, "-"),
    "infopo full beta0.1 lr0.0002": (style.VERMILLION, "-"),
    "infopo full beta0.1 lr0.0002 cap0": (style.VERMILLION, "--"),
    "infopo lora16 beta0.1 lr0.0002": (style.BLUE, ":"),
    "infopo lora16 beta0.1 lr0.002": (style.ORANGE, ":"),
}
"""What a good rate, a large one and a cap look like."""


def _tuning(record: Record, path: Path) -> None:
    runs = record.rows.set_index("run")
    s = record.settings
    title = (
        f"SmolLM2-135M-Instruct, {s['steps']} steps of {s['batch']} pairs, float32: the step's batch, before the step\n"
        f"{_machine(record)}"
    )
    with style.drawing(path, title, 2, height=4.6) as (figure, axes):
        ratio, weight = axes[0]
        for name, (colour, dash) in _RUNS.items():
            if name not in runs.index:
                continue
            train = pd.DataFrame(runs.loc[name, "train"])
            look = {"color": colour, "linestyle": dash, "label": name.removeprefix("infopo ")}
            ratio.plot(train.index + 1, train["chosen_log_ratio"], **look)
            weight.plot(train.index + 1, train["rejected_weight"] / runs.loc[name, "beta"], **look)
        ratio.set(title="chosen responses", ylabel="log-ratio to the start (nats)")
        weight.set(title="rejected responses", ylabel="mean weight / beta")
        weight.axhline(1, color="black", linewidth=0.8)
        for ax in (ratio, weight):
            ax.set_xlabel("optimiser step")
        style.legend(figure, ratio, columns=3)


DRAWERS: Final[dict[str, Callable[[Record, Path], None]]] = {
    "speed": _speed,
    "memory": _memory,
    "long-context": _long,
    "accuracy": _accuracy,
    "training": _training,
    "long-context-training": _long_training,
    "tuning-sweep": _tuning,
}


def draw(records: Records, folder: Path) -> list[Path]:
    """Write the plots of what was measured; their paths."""
    parts = [part for part in DRAWERS if part in records and len(records[part].rows)]
    for part in parts:
        DRAWERS[part](records[part], folder / f"{part}.png")
    return [folder / f"{part}.png" for part in parts]
