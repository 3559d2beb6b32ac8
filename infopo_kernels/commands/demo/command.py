"""`python -m infopo_kernels demo`: the main job in a few minutes on two cores.

SmolLM2-135M-Instruct is tuned on arithmetic word problems with InfoPO and, from the same start and on the same batches,
with DPO. Held-out pairs show what each does to the likelihood of the responses, and how many of the problems greedy
decoding solves, before and after.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
import transformers
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer, PrinterCallback

from infopo_kernels.commands.console import wide_console
from infopo_kernels.commands.demo.callbacks import Lines, Stop
from infopo_kernels.commands.demo.plot import plot_runs
from infopo_kernels.commands.demo.solving import answers, solved
from infopo_kernels.commands.demo.word_problems import Pair, word_problems
from infopo_kernels.commands.errors import OneSentence, user_errors
from infopo_kernels.commands.metrics_file import MetricsFile, Record, write_record
from infopo_kernels.commands.report import evaluation_table, evaluations
from infopo_kernels.commands.smollm2 import SMOLLM2, smollm2_directory
from infopo_kernels.integrations.preferences import preference_features
from infopo_kernels.integrations.trl import InfoPOConfig, InfoPOTrainer
from infopo_kernels.objectives import DPO, InfoPO
from infopo_kernels.objectives.base import Sequences, Terms

RUNS: Final = {"InfoPO": "infopo", "DPO": "sigmoid"}
"""The runs, and the `loss_type` of each."""


@dataclass(frozen=True)
class DPOWithBound(DPO):
    """DPO that also logs InfoPO's bound, so that the two runs can be compared; the loss is DPO's."""

    name: ClassVar[str] = "dpo_with_bound"

    def terms(self, sums: Tensor, sequences: Sequences) -> Terms:
        """DPO's, with InfoPO's bound."""
        return super().terms(sums, sequences)._replace(bound=InfoPO(self.beta).terms(sums, sequences).bound)


_MAX_NEW_TOKENS: Final = 96
"""The longest right answer has 60 tokens; the model as it is says more, and gets half as much again."""

_SECONDS_TO_FINISH: Final = 8.0
"""For saving the model and plotting, on two cores."""


def _number(kind: type, least: float) -> Any:
    """A type for argparse: a number that is not below `least`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a number from {least:g}, got {text!r}")
        return value

    return parse


class _Parser(OneSentence, argparse.ArgumentParser):
    pass


def _parser(prog: str) -> argparse.ArgumentParser:
    count, real = _number(int, 1), _number(float, 0)
    parser = _Parser(prog=prog, description=(__doc__ or "").split("\n\n", 1)[1])
    parser.add_argument("--output", type=Path, default=Path("out/demo"), metavar="DIR", help="default: out/demo")
    parser.add_argument("--model", default=SMOLLM2, help="another start: a directory or hub id, with a chat template")
    parser.add_argument("--steps", type=count, default=16, help="optimiser steps of each run (default: 16)")
    parser.add_argument("--batch", type=count, default=4, help="pairs in a step (default: 4)")
    parser.add_argument("--pairs", type=count, help="pairs to train on (default: as many as the steps need)")
    parser.add_argument("--held-out", type=count, default=32, help="problems to score and to solve (default: 32)")
    parser.add_argument("--lr", type=real, default=2e-5, help="peak learning rate (default: 2e-5)")
    parser.add_argument("--beta", type=real, default=0.1, help="scale of the log-ratio (default: 0.1)")
    parser.add_argument("--seed", type=_number(int, 0), default=0, help="of problems and order (default: 0)")
    parser.add_argument(
        "--minutes", type=real, default=4.0, help="end in about this time, if need be before all steps are done"
    )
    return parser


class Demo:
    """Everything that both runs share."""

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self.args, self.console, self.begin = args, console, time.perf_counter()
        self.output: Path = args.output
        self.metrics = self.output / "metrics.jsonl"
        pairs = args.pairs or args.steps * args.batch
        problems = word_problems(pairs + args.held_out, args.seed)
        self.training, self.held_out = problems[:pairs], problems[pairs:]
        with user_errors(f"--output {self.output}: "):
            self.output.mkdir(parents=True, exist_ok=True)
            self.metrics.unlink(missing_ok=True)
            for name, part in (("train", self.training), ("held_out", self.held_out)):
                lines = "".join(json.dumps(problem.row()) + "\n" for problem in part)
                (self.output / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        self.model = str(smollm2_directory()) if args.model == SMOLLM2 else args.model
        with user_errors(f"--model {args.model} cannot be loaded: "):
            self.tokenizer = AutoTokenizer.from_pretrained(self.model)
        with user_errors():
            self.datasets = [self._dataset(self.training), self._dataset(self.held_out)]

    def _dataset(self, problems: Sequence[Pair]) -> Any:
        return Dataset.from_list(preference_features(self.tokenizer, [problem.row() for problem in problems]))

    def trainer(self, name: str) -> InfoPOTrainer:
        """The trainer of one run. The first one scores the pairs with the reference; the second finds the values.

        Both responses of a pair share their prompt in a packed row: a third fewer tokens than padded batches have.
        """
        args = self.args
        config = InfoPOConfig(
            str(self.output), loss_type=[RUNS[name]], beta=args.beta, learning_rate=args.lr,
            max_steps=args.steps, per_device_train_batch_size=args.batch, per_device_eval_batch_size=8,
            warmup_steps=0, adam_beta2=0.99, max_length=None, seed=args.seed, precompute_ref_log_probs=True,
            padding_free=True, share_prompt=True, gradient_checkpointing=False, bf16=False, save_strategy="no",
            logging_steps=1, report_to="none", disable_tqdm=True, dataloader_pin_memory=torch.cuda.is_available(),
            model_init_kwargs={"dtype": "float32"},
        )  # fmt: skip
        callbacks = [MetricsFile(self.metrics, run=name), Lines(self.console, name, args.beta)]
        trainer = InfoPOTrainer(
            self.model, args=config, train_dataset=self.datasets[0], eval_dataset=self.datasets[1],
            processing_class=self.tokenizer, callbacks=callbacks,
        )  # fmt: skip
        if name == "DPO":
            trainer.objective = DPOWithBound(args.beta)
        trainer.remove_callback(PrinterCallback)
        self.datasets = [trainer.train_dataset, trainer.eval_dataset]
        return trainer

    def solve(self, name: str, step: int, trainer: InfoPOTrainer) -> tuple[float, list[str]]:
        """The share of held-out problems that the trainer's model solves, and its answers."""
        texts = answers(trainer.model, self.tokenizer, self.held_out, _MAX_NEW_TOKENS)
        share = solved(texts, self.held_out)
        write_record(self.metrics, {"step": step, "run": name, "solved": share})
        self.console.print(f"{name}: {share:.0%} of {len(texts)} held-out problems solved.", highlight=False)
        return share, texts

    @property
    def seconds(self) -> float:
        """Since the demo began."""
        return time.perf_counter() - self.begin


def main(words: Sequence[str], prog: str) -> None:
    """Generate, train both, save, report.

    Raises:
        UserError: something that the user can put right.
    """
    args = _parser(prog).parse_args(words)
    console = wide_console()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="transformers|trl"
    )  # these libraries warn of each other
    demo = Demo(args, console)
    example = demo.training[0]
    console.print(f"For example: {example.question}\n  chosen:   {example.chosen}\n  rejected: {example.rejected}\n")
    console.print(
        f"{len(demo.training)} pairs to train on, {len(demo.held_out)} held out; {args.steps} steps of {args.batch} "
        f"pairs, lr {args.lr:g}, beta {args.beta:g}, float32; the same for both losses.\n"
        f"Scoring all pairs with the reference, which is the start, and decoding the held-out problems.",
        highlight=False,
    )
    logs: dict[str, list[Record]] = {}
    shares: dict[str, float] = {}
    texts: dict[str, list[str]] = {}
    steps = args.steps
    for name in RUNS:
        with user_errors():
            trainer = demo.trainer(name)
        if not logs:
            started = time.perf_counter()
            shares["start"], texts["start"] = demo.solve("start", 0, trainer)
            trainer.evaluate()
            to_finish = time.perf_counter() - started
            start = trainer.state.log_history[-1:]
            left = 60 * args.minutes - demo.seconds - _SECONDS_TO_FINISH
            trainer.add_callback(Stop(seconds=left / 2 - to_finish))
        else:
            trainer.add_callback(Stop(steps=steps))
        trainer.train()
        steps = trainer.state.global_step
        trainer.evaluate()
        logs[name] = start + trainer.state.log_history
        shares[name], texts[name] = demo.solve(name, steps, trainer)
        if name == "InfoPO":
            trainer.save_model(str(demo.output / "model"))
        del trainer
    plot_runs(logs, demo.output / "training.png", beta=args.beta, title=_title(demo, steps))
    _write_answers(demo, texts)
    console.print(_table(logs, shares, demo))
    console.print(claim(logs), highlight=False)
    if steps < args.steps:
        console.print(f"Stopped after {steps} of {args.steps} steps to end within {args.minutes:g} minutes.")
    console.print(
        f"In {demo.output}: metrics.jsonl, training.png, answers.jsonl, model (tuned with InfoPO), train.jsonl, "
        f"held_out.jsonl. Took {demo.seconds:.0f} s.",
        highlight=False,
    )


def _title(demo: Demo, steps: int) -> str:
    args = demo.args
    name = "SmolLM2-135M-Instruct" if args.model == SMOLLM2 else Path(args.model).name
    return (
        f"{name} on arithmetic word problems: {steps} steps of {args.batch} pairs, lr {args.lr:g}, "
        f"beta {args.beta:g}, {len(demo.held_out)} held-out pairs"
    )


def _write_answers(demo: Demo, texts: dict[str, list[str]]) -> None:
    rows = (
        {"question": problem.question, "answer": problem.answer, **{name: each[index] for name, each in texts.items()}}
        for index, problem in enumerate(demo.held_out)
    )
    (demo.output / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _table(logs: dict[str, list[Record]], shares: dict[str, float], demo: Demo) -> Table:
    table = evaluation_table(logs, f"{len(demo.held_out)} held-out problems, before → after")
    table.add_row(
        f"Problems solved (greedy, {_MAX_NEW_TOKENS} tokens)",
        *(f"{shares['start']:.0%} → {shares[name]:.0%}" for name in logs),
    )
    return table


def claim(logs: dict[str, list[Record]]) -> str:
    """Whether the runs show what the paper claims."""
    change = {}
    for name, records in logs.items():
        found = [record["eval_logps/chosen"] for record in evaluations(records)]
        change[name] = found[-1] - found[0]
    infopo, dpo = change["InfoPO"], change["DPO"]
    if infopo >= 0 > dpo:
        verdict = "as the paper says"
    elif infopo >= 0 and infopo > dpo:
        verdict = "InfoPO keeps it as the paper says; DPO does not lose it in this run"
    else:
        verdict = "this run does not show what the paper says"
    return (
        f"Likelihood of the held-out chosen responses: {infopo:+.2f} nats under InfoPO, {dpo:+.2f} nats under DPO "
        f"({verdict})."
    )
