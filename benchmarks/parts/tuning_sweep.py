"""Find a beta and a learning rate to start from: short runs on SmolLM2-135M-Instruct, with full tuning and with LoRA.

    python -m benchmarks tuning-sweep                                          # all runs, 12 steps: `tuning-sweep`
    python -m benchmarks tuning-sweep --only "lora16 beta0.1 lr0.0001"         # a part of them
    python -m benchmarks tuning-sweep --steps 40 --name tuning-sweep-long --only ...

Every run starts from the same weights, and sees the same pairs of the demo's generator in the same order. The held-out
pairs are scored before and after the run. A run that the record already has, with the same size, is not repeated.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import plots, records, report
from benchmarks.measure.environment import environment
from infopo_kernels import KernelOptions, infopo_loss
from infopo_kernels.commands.demo.word_problems import word_problems
from infopo_kernels.commands.smollm2 import smollm2_directory
from infopo_kernels.integrations.collators import PreferenceCollator
from infopo_kernels.integrations.preferences import preference_features
from infopo_kernels.integrations.transformers import attach_linear_logps

RECORD = "tuning-sweep"


@dataclass(frozen=True)
class Setting:
    """One run."""

    beta: float
    lr: float
    lora_rank: int | None = None
    average: bool = False
    max_log_weight: float | None = None
    loss: str = "infopo"
    tail_threshold: float = 0.0
    seed: int = 0
    """Of the pairs that are trained on; the held-out pairs are the same for all."""

    @property
    def name(self) -> str:
        """The name of the run, as in the record and the guide."""
        kind = "full" if self.lora_rank is None else f"lora{self.lora_rank}"
        extra = " average" * self.average + (f" cap{self.max_log_weight:g}" if self.max_log_weight is not None else "")
        extra += f" tail{self.tail_threshold:.3g}" * (self.tail_threshold > 0) + f" seed{self.seed}" * (self.seed > 0)
        return f"{self.loss} {kind} beta{self.beta:g} lr{self.lr:g}{extra}"


SETTINGS = [
    *(Setting(0.1, lr) for lr in (1e-5, 2e-5, 5e-5, 2e-4, 1e-3)),
    *(Setting(0.1, lr, max_log_weight=0.0) for lr in (5e-5, 2e-4, 1e-3)),
    *(Setting(beta, 2e-5) for beta in (0.03, 0.3)),
    Setting(5.0, 2e-5, average=True),
    Setting(0.1, 2e-5, loss="dpo"),
    *(Setting(0.1, lr, lora_rank=16) for lr in (1e-4, 2e-4, 5e-4, 2e-3)),
]


@dataclass(frozen=True)
class Part:
    """Batches, and for each the log-probabilities of the common start: sums and means [2B]."""

    batches: list[dict[str, Any]]
    reference: list[dict[bool, Tensor]]


def _model(lora_rank: int | None = None, tail_threshold: float = 0.0) -> Any:
    model = AutoModelForCausalLM.from_pretrained(str(smollm2_directory()), dtype=torch.float32)
    if lora_rank is not None:
        # Imported here: PEFT is needed for the run with an adapter only.
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    return attach_linear_logps(model, kernel=KernelOptions(tail_threshold=tail_threshold))


def _logps(model: Any, batch: dict[str, Any], average: bool) -> Tensor:
    """[2B] float64, nats."""
    logps: Tensor = model(**batch, linear_logps="mean" if average else "sum").logps
    return logps


def prepare(args: argparse.Namespace, seed: int = 0) -> tuple[Part, Part]:
    """The training batches, one for each step, and the held-out batches. The reference is the same for every run."""
    rows = [pair.row() for pair in word_problems(args.steps * args.batch + args.held_out, 0)]
    if seed > 0:
        rows = [pair.row() for pair in word_problems(args.steps * args.batch, seed)] + rows[-args.held_out :]
    features = preference_features(AutoTokenizer.from_pretrained(str(smollm2_directory())), rows, 512)
    collate, model = PreferenceCollator(), _model().eval()

    def part(of: list[dict[str, Any]]) -> Part:
        batches = [collate(of[start : start + args.batch]) for start in range(0, len(of), args.batch)]
        with torch.no_grad():
            reference = [{average: _logps(model, batch, average) for average in (False, True)} for batch in batches]
        return Part(batches, reference)

    return part(features[: -args.held_out]), part(features[-args.held_out :])


def _loss(logps: Tensor, reference: Tensor, setting: Setting) -> tuple[Tensor, dict[str, float]]:
    """The loss of [2B] log-probabilities (means under `average`), differentiable, and the recorded metrics.

    chosen_log_ratio, rejected_log_ratio   to the start, nats, means
    reward_accuracy                        share of pairs with the chosen ratio higher
    mi_lower_bound                         nats
    rejected_weight                        size of the loss's derivative by a rejected log-probability, mean
    """
    (chosen, rejected), (ratio_c, ratio_r) = logps.chunk(2), (logps - reference).chunk(2)
    beta = setting.beta
    out = infopo_loss(chosen, rejected, *reference.chunk(2), beta=beta, max_log_weight=setting.max_log_weight)
    loss, weight = out.loss, out.rejected_weights.mean()
    if setting.loss == "dpo":
        margin = beta * (ratio_c - ratio_r)
        loss, weight = -torch.nn.functional.logsigmoid(margin).mean(), beta * torch.sigmoid(-margin).mean()
    values = {
        "loss": loss, "chosen_log_ratio": ratio_c.mean(), "rejected_log_ratio": ratio_r.mean(),
        "reward_accuracy": (ratio_c > ratio_r).double().mean(), "mi_lower_bound": out.mi_lower_bound,
        "rejected_weight": weight,
    }  # fmt: skip
    return loss, {name: float(value.detach()) for name, value in values.items()}


def _chosen_first(batches: list[Tensor]) -> Tensor:
    """One [2B] tensor from those of several batches."""
    halves = [values.chunk(2) for values in batches]
    return torch.cat([half[i] for i in (0, 1) for half in halves])


def measure(setting: Setting, train: Part, held_out: Part, progress: Any) -> dict[str, Any]:
    """The row of one run: metrics of each step, and metrics of the held-out pairs after the run."""
    torch.manual_seed(0)
    steps, start = len(train.batches), time.perf_counter()
    model = _model(setting.lora_rank, setting.tail_threshold).train()
    rows: list[dict[str, float]] = []
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=setting.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    warmup = round(0.1 * steps)
    # The rate rises, then falls linearly. It is not 0 at the first and the last step, since such a step does nothing.
    factors = [(s + 1) / (warmup + 1) if s < warmup else 1 - (s - warmup) / (steps - warmup) for s in range(steps)]
    about = {"run": setting.name, **asdict(setting)}
    for step, (batch, known, factor) in enumerate(zip(train.batches, train.reference, factors, strict=True), 1):
        logps = _logps(model, batch, setting.average)
        loss, row = _loss(logps, known[setting.average], setting)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
        if not math.isfinite(norm):
            stopped = f"step {step}: the gradient's norm is {norm}"
            return {**about, "seconds": time.perf_counter() - start, "train": rows, "stopped": stopped}
        optimizer.param_groups[0]["lr"] = setting.lr * factor
        optimizer.step()
        optimizer.zero_grad()
        rows.append(row | {"learning_rate": setting.lr * factor, "gradient_norm": norm})
        progress(f"  step {step}: chosen {row['chosen_log_ratio']:+.2f}, rejected {row['rejected_log_ratio']:+.2f}")
    seconds, model = time.perf_counter() - start, model.eval()
    with torch.no_grad():
        scored = _chosen_first([_logps(model, batch, setting.average) for batch in held_out.batches])
    reference = _chosen_first([of_batch[setting.average] for of_batch in held_out.reference])
    return {**about, "seconds": seconds, "train": rows, "after": _loss(scored, reference, setting)[1]}


def table(record: records.Record) -> report.Table:
    """A table of the results on the held-out pairs."""
    rows = []
    for run in record.rows.to_dict("records"):
        norm = max((step["gradient_norm"] for step in run["train"]), default=float("nan"))
        if isinstance(stopped := run.get("stopped"), str):
            rows.append([run["run"], f"stopped: {stopped.split(';')[0]}", "", "", "", "", f"{norm:.0f}"])
            continue
        after, weight = run["after"], run["after"]["rejected_weight"] / run["beta"]
        signed = [f"{after[key]:+.2f}" for key in ("chosen_log_ratio", "rejected_log_ratio")]
        figures = [f"{after['reward_accuracy']:.2f}", f"{after['mi_lower_bound']:+.3f}", f"{weight:.3f}", f"{norm:.1f}"]
        rows.append([run["run"], *signed, *figures])
    s, m = record.settings, record.machine
    title = (
        f"{s['steps']} steps of {s['batch']} pairs, {s['held_out_pairs']} held-out pairs, float32, {m['cpu']}, "
        f"{m['threads']} threads, torch {m['versions']['torch']}; {record.rows['seconds'].median() / 60:.1f} minutes a "
        f"run at the median."
    )
    heads = ["chosen, nats", "rejected, nats", "accuracy", "bound, nats", "rejected weight / β", "gradient norm, max"]
    return report.Table(record.part, title, ["run", *heads], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Do the missing runs, write the record, show the table."""
    parser = records.parser(RECORD, __doc__)
    parser.add_argument("--name", default=RECORD, help="name of the record; each size of runs has its own")
    parser.add_argument(
        "--only", metavar="TEXT", action="append", help="do only runs whose name contains TEXT (default: all)"
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--held-out", type=int, default=24)
    args = parser.parse_args(argv)
    console, machine, parts = report.console(), environment(), None
    sizes = {"steps": args.steps, "batch": args.batch, "held_out_pairs": args.held_out}
    path = records.path_of(args.output, args.name, machine)
    before = records.read(path) if path.exists() else None
    there = set(before.rows["run"]) if before is not None and sizes.items() <= before.settings.items() else set()
    record = before
    for setting in SETTINGS:
        if setting.name in there or not any(text in setting.name for text in args.only or [""]):
            continue
        console.print(f"[bold]{setting.name}[/bold]", highlight=False)
        parts = parts or prepare(args)
        row = measure(setting, *parts, lambda text: console.print(text, highlight=False))
        record = records.merge(args.output, args.name, machine, [row], by=("run",), **sizes)
    if record is None:
        parser.error(f"--only {args.only}: no name of a run contains that; runs: {', '.join(s.name for s in SETTINGS)}")
    report.render(console, [table(record)])
    plots.draw({args.name: record}, path.parent)
    return 0
