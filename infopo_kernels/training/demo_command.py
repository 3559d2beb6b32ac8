"""`python -m infopo_kernels demo`: the main job in a few minutes on two cores.

SmolLM2-135M-Instruct is tuned on arithmetic word problems with InfoPO through the fused op and, from the same start and
on the same batches, with DPO; the held-out pairs show what each does to the likelihood of the chosen responses.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Final

from rich.console import Console

from infopo_kernels.training.data import parse_preference
from infopo_kernels.training.head_memory import HeadShape, measure_head_memory
from infopo_kernels.training.loop import run
from infopo_kernels.training.metrics import LOSSES, TITLES, MetricsFile
from infopo_kernels.training.options import (
    add_training_options,
    infopo_options,
    kernel_options,
    loading,
    output_directory,
    positive,
    positive_real,
    train_options,
)
from infopo_kernels.training.plot import plot_history
from infopo_kernels.training.policy import Policy, load_tokenizer
from infopo_kernels.training.progress import Progress
from infopo_kernels.training.report import claim, result_table
from infopo_kernels.commands.smollm2 import SMOLLM2
from infopo_kernels.training.tokens import tokenize
from infopo_kernels.training.trainer import Trainer
from infopo_kernels.commands.demo.word_problems import word_problems

_SECONDS_TO_FINISH: Final = 15.0
"""For saving, plotting and the measurement of memory at the end: about 10 s on two cores."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `demo`. Both losses get the same."""
    parser.description = __doc__.split("\n\n", 1)[1] if __doc__ else None
    parser.add_argument("--output", type=Path, default=Path("out/demo"), metavar="DIR", help="default: out/demo")
    parser.add_argument("--model", default=SMOLLM2, help="another start: a directory or hub id, with a chat template")
    parser.add_argument("--pairs", type=positive, default=208, help="pairs to train on (default: 208)")
    parser.add_argument("--held-out", type=positive, default=32, help="pairs to score (default: 32)")
    parser.add_argument(
        "--minutes", type=positive_real, default=4.0, help="stop before all steps are done if need be (default: 4)"
    )
    add_training_options(parser, steps=16, lr=2e-5)


def main(args: argparse.Namespace, console: Console) -> None:
    """Generate, train both, save, report."""
    begin = time.perf_counter()
    args.loss = LOSSES[0]
    output = output_directory(args.output, overwrite=True)
    problems = word_problems(args.pairs + args.held_out, args.seed)
    for name, part in (("train", problems[: args.pairs]), ("held_out", problems[args.pairs :])):
        lines = (json.dumps(problem.row()) for problem in part)
        (output / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    load, kernel, infopo = loading(args), kernel_options(args), infopo_options(args)
    options = train_options(args, steps=args.steps)
    with console.status("Loading the model") if console.is_terminal else nullcontext():
        tokenizer = load_tokenizer(args.model, load)
        policies = [Policy.load(args.model, load, kernel, tokenizer) for _ in LOSSES]
    examples = tokenize(tokenizer, (parse_preference(problem.row()) for problem in problems), None).examples
    training, held_out = examples[: args.pairs], examples[args.pairs :]
    policies[0].check_examples(training)
    visits = args.steps * args.batch * args.accumulate
    problem = problems[0]
    console.print(f"For example: {problem.question}\n  chosen:   {problem.chosen}\n  rejected: {problem.rejected}\n")
    console.print(
        f"{args.pairs} pairs to train on, {args.held_out} held out. {args.steps} steps of {visits // args.steps} pairs "
        f"({min(visits, args.pairs)} of them are visited), lr {args.lr:g}, beta {infopo.beta:g}, offset "
        f"{infopo.offset:g}, {args.dtype} on {load.device}; the same for both losses.",
        highlight=False,
    )
    trainers = [Trainer(policy, replace(options, loss=loss)) for loss, policy in zip(LOSSES, policies, strict=True)]
    budget = 60 * args.minutes - (time.perf_counter() - begin) - _SECONDS_TO_FINISH
    with closing(MetricsFile(output / "metrics.jsonl")) as metrics, Progress(console) as progress:
        history = run(trainers, training, held_out, progress, metrics, seconds=budget)
    policies[0].save(output / "model")
    plot_history(history, LOSSES, output / "training.png", title=f"{args.model}, word problems", average=infopo.average)

    table = result_table(history, LOSSES, average=infopo.average)
    batch = training[: args.batch]
    vocabulary, width = policies[0].head_shape
    shape = HeadShape(
        sequences=2 * args.batch,
        length=max(len(e.prompt) + max(len(e.chosen), len(e.rejected)) for e in batch),
        prompt=min(len(e.prompt) for e in batch),
        width=width,
        vocabulary=vocabulary,
        backend=args.backend,
        workspace_mib=args.workspace_mib,
    )
    if load.device.type == "cpu":
        peak = measure_head_memory(shape)
        if peak["fused"] is not None and peak["naive"] is not None:
            table.add_section()
            label = "Memory of head and loss beyond gradients (MiB)"
            table.add_row(label, f"fused: {peak['fused']:,.0f}", f"naive logits: {peak['naive']:,.0f}")
            table.caption = (
                f"Memory measured on a batch of {shape.sequences} × {shape.length} tokens, vocabulary "
                f"{shape.vocabulary:,}, each in a fresh process. A step's peak holds both models and optimisers."
            )
    console.print(table)
    console.print(claim(history), highlight=False)
    if history.out_of_time:
        done = history.select(LOSSES[0], "train")[-1]["step"]
        console.print(f"Stopped after {done} of {args.steps} steps to end within {args.minutes:g} minutes.")
    console.print(
        f"In {output}: metrics.jsonl, training.png, model (tuned with {TITLES[LOSSES[0]]}), train.jsonl, "
        f"held_out.jsonl. Took {time.perf_counter() - begin:.0f} s.",
        highlight=False,
    )
