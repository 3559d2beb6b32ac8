"""Which beta and learning rate to start from: short runs on SmolLM2-135M-Instruct, full tuning and LoRA.

    python benchmarks/tuning_sweep.py                                                        # all runs, short
    python benchmarks/tuning_sweep.py --only "lora16 beta0.1 lr0.0001"                       # a part of them
    python benchmarks/tuning_sweep.py --steps 40 --output benchmarks/results/tuning_sweep_long.json --only ...

Every run starts from the same weights and sees the same pairs of the demo's generator in the same order; the held-out
pairs are scored before and after. Runs of the same size that are in the output already are not repeated. The tables of
docs/tuning_guide.md come from here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from infopo_kernels.bench.environment import environment
from infopo_kernels.objectives import InfoPOOptions
from infopo_kernels.options import KernelOptions
from infopo_kernels.training.batches import collate
from infopo_kernels.training.data import parse_preference
from infopo_kernels.training.errors import UserError
from infopo_kernels.training.policy import Loading, Policy, load_tokenizer
from infopo_kernels.training.tokens import Example, tokenize
from infopo_kernels.training.trainer import Trainer, TrainOptions, all_logps, evaluation
from infopo_kernels.training.word_problems import word_problems


@dataclass(frozen=True)
class Setting:
    """One run."""

    beta: float
    lr: float
    lora_rank: int | None = None
    average: bool = False
    max_log_weight: float | None = None
    loss: str = "infopo"

    @property
    def name(self) -> str:
        kind = "full" if self.lora_rank is None else f"lora{self.lora_rank}"
        extra = " average" * self.average + (f" cap{self.max_log_weight:g}" if self.max_log_weight is not None else "")
        return f"{self.loss} {kind} beta{self.beta:g} lr{self.lr:g}{extra}"


SETTINGS = [
    *(Setting(0.1, lr) for lr in (1e-5, 2e-5, 5e-5, 2e-4, 1e-3)),
    *(Setting(0.1, lr, max_log_weight=0.0) for lr in (5e-5, 2e-4, 1e-3)),
    *(Setting(beta, 2e-5) for beta in (0.03, 0.3)),
    Setting(5.0, 2e-5, average=True),
    Setting(0.1, 2e-5, loss="dpo"),
    *(Setting(0.1, lr, lora_rank=16) for lr in (1e-4, 2e-4, 5e-4, 2e-3)),
]

PLOTTED = {
    "infopo full beta0.1 lr1e-05": "C0-", "infopo full beta0.1 lr5e-05": "C2-", "infopo full beta0.1 lr0.0002": "C3-",
    "infopo full beta0.1 lr0.0002 cap0": "C3--", "infopo lora16 beta0.1 lr0.0002": "C0:",
    "infopo lora16 beta0.1 lr0.002": "C1:",
}  # fmt: skip
"""Names of runs, and matplotlib's format of their lines."""


@dataclass
class Data:
    """Pairs to train on and to score, with the log-probabilities of the common start, sums and means."""

    examples: list[Example]
    held_out: list[Example]
    reference: dict[bool, Tensor]
    held_out_reference: dict[bool, Tensor]


def prepare(args: argparse.Namespace) -> Data:
    """The reference is the same for every run: it is formed once."""
    loading = Loading()
    tokenizer = load_tokenizer("smollm2", loading)
    pairs = [parse_preference(pair.row()) for pair in word_problems(args.steps * args.batch + args.held_out, 0)]
    examples = tokenize(tokenizer, pairs, 512).examples
    train, held_out = examples[: -args.held_out], examples[-args.held_out :]
    policy = Policy.load("smollm2", loading, KernelOptions(), tokenizer)

    def score(part: list[Example]) -> dict[bool, Tensor]:
        sums = all_logps(policy, part, args.batch, False)
        lengths = torch.tensor([[len(e.chosen), len(e.rejected)] for e in part])
        return {False: sums, True: sums / lengths}

    return Data(train, held_out, score(train), score(held_out))


def measure(setting: Setting, data: Data, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The metrics of one run, by step and after."""
    torch.manual_seed(0)
    policy = Policy.load("smollm2", Loading(lora_rank=setting.lora_rank), KernelOptions())
    objective = InfoPOOptions(setting.beta, max_log_weight=setting.max_log_weight, average=setting.average)
    options = TrainOptions(loss=setting.loss, infopo=objective, lr=setting.lr, steps=args.steps, batch=args.batch)
    found = environment("cpu")
    about = {
        **asdict(setting), "steps": args.steps, "batch": args.batch, "held_out_pairs": args.held_out,
        "machine": f"{found['cpu']}, {found['threads']} threads, torch {found['versions']['torch']}",
    }  # fmt: skip
    trainer, records, start = Trainer(policy, options), [], time.perf_counter()
    for step in range(args.steps):
        part = slice(step * args.batch, (step + 1) * args.batch)
        batch = collate(data.examples[part], policy.pad_token_id, policy.loading.device)
        try:
            records.append(trainer.step([(batch, data.reference[setting.average][part].T.reshape(-1))]))
        except UserError as error:
            return {**about, "seconds": time.perf_counter() - start, "train": records, "stopped": str(error)}
        last = records[-1]
        console.print(
            f"  step {step + 1}: chosen {last['chosen_log_ratio']:+.2f}, rejected {last['rejected_log_ratio']:+.2f}, "
            f"gradient {last['gradient_norm']:.1f}", highlight=False,
        )  # fmt: skip
    logps = all_logps(policy, data.held_out, args.batch, setting.average)
    after = evaluation(logps, data.held_out_reference[setting.average], data.held_out, options)
    return {**about, "seconds": time.perf_counter() - start, "train": records, "after": after}


def table(results: dict[str, Any]) -> Table:
    """What became of the held-out pairs."""
    made = Table(title="Held-out pairs, change from before to after")
    for column in ("run", "chosen, nats", "rejected, nats", "accuracy", "bound, nats", "rejected weight / beta"):
        made.add_column(column, justify="left" if column == "run" else "right")
    for name, result in results.items():
        if "stopped" in result:
            made.add_row(name, result["stopped"])
            continue
        after = result["after"]
        made.add_row(
            name, f"{after['chosen_log_ratio']:+.2f}", f"{after['rejected_log_ratio']:+.2f}",
            f"{after['reward_accuracy']:.2f}", f"{after['mi_lower_bound']:+.3f}",
            f"{after['rejected_weight'] / result['beta']:.3f}",
        )  # fmt: skip
    return made


def write_guide(results: dict[str, Any], path: Path, record: str) -> None:
    """Put the table of a record between its markers in the guide."""
    begin, end = f"<!-- {record}: begin -->", f"<!-- {record}: end -->"
    first = next(iter(results.values()))
    minutes = statistics.median(result["seconds"] for result in results.values()) / 60
    lines = [
        f"{first['steps']} steps of {first['batch']} pairs, {first['held_out_pairs']} held-out pairs, float32, "
        f"{first['machine']}; {minutes:.1f} minutes a run at the median.",
        "",
        "| run | chosen, nats | rejected, nats | accuracy | bound, nats | rejected weight / β | gradient norm, max |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, result in results.items():
        norm = max((record["gradient_norm"] for record in result["train"]), default=float("nan"))
        if "stopped" in result:
            lines.append(f"| {name} | stopped: {result['stopped'].split(';')[0]} | | | | | {norm:.0f} |")
            continue
        after = result["after"]
        weight = f"{after['rejected_weight'] / result['beta']:.3f}"
        lines.append(
            f"| {name} | {after['chosen_log_ratio']:+.2f} | {after['rejected_log_ratio']:+.2f} | "
            f"{after['reward_accuracy']:.2f} | {after['mi_lower_bound']:+.3f} | {weight} | {norm:.1f} |"
        )
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(begin)
    path.write_text("\n".join([before + begin, *lines, end + rest.split(end)[1]]), encoding="utf-8")


def plot(results: dict[str, Any], path: Path) -> None:
    """The runs of `PLOTTED`, step by step: what a good rate, a large one and a cap look like."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    ratio, weight = figure.subplots(1, 2)
    for name, style in PLOTTED.items():
        train = results[name]["train"]
        steps = [step + 1 for step in range(len(train))]
        ratio.plot(steps, [record["chosen_log_ratio"] for record in train], style, label=name.removeprefix("infopo "))
        weight.plot(steps, [record["rejected_weight"] / results[name]["beta"] for record in train], style)
    ratio.set_title("Chosen responses of the step's batch")
    ratio.set_ylabel("log-ratio to the start, nats")
    weight.set_title("Rejected responses of the step's batch")
    weight.set_ylabel("mean weight / beta")
    weight.axhline(1, color="0.4", linewidth=0.8)
    for axes in (ratio, weight):
        axes.set_xlabel("optimiser step")
        axes.grid(alpha=0.3)
    figure.legend(*ratio.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(path)


def main() -> None:
    """Run what is missing, write the record, show the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/tuning_sweep.json"))
    parser.add_argument("--only", metavar="TEXT", action="append", help="runs whose name holds this (default: all)")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--held-out", type=int, default=24)
    parser.add_argument("--guide", type=Path, help="write the table into this document, too")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="plot some of the runs, step by step")
    args = parser.parse_args()
    console, data = Console(width=120), None
    results: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    size = {"steps": args.steps, "batch": args.batch, "held_out_pairs": args.held_out}
    results = {name: result for name, result in results.items() if size.items() <= result.items()}
    wanted = [setting for setting in SETTINGS if any(text in setting.name for text in args.only or [""])]
    for setting in (setting for setting in wanted if setting.name not in results):
        console.print(f"[bold]{setting.name}[/bold]", highlight=False)
        data = data or prepare(args)
        results[setting.name] = measure(setting, data, args, console)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        in_order = [setting.name for setting in SETTINGS if setting.name in results]
        results = {name: results[name] for name in in_order}
        args.output.write_text(json.dumps(results, indent=1) + "\n")
    console.print(table(results))
    if args.guide:
        write_guide(results, args.guide, args.output.stem)
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
