"""`python -m infopo_kernels train`: tune a model on preference pairs."""

from __future__ import annotations

import argparse
import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Final

from rich.console import Console
from torch import Tensor

from infopo_kernels.reference_logps import ReferenceTable
from infopo_kernels.training.batches import split_held_out
from infopo_kernels.training.data import Preference, read_preferences
from infopo_kernels.training.errors import UserError
from infopo_kernels.training.loop import run
from infopo_kernels.training.metrics import LOSSES, TITLES, MetricsFile
from infopo_kernels.training.options import (
    add_training_options,
    infopo_options,
    kernel_options,
    loading,
    natural,
    output_directory,
    positive,
    positive_real,
    real,
    train_options,
)
from infopo_kernels.training.plot import plot_history
from infopo_kernels.training.policy import Policy, load_tokenizer
from infopo_kernels.training.progress import Progress
from infopo_kernels.training.report import result_table
from infopo_kernels.commands.smollm2 import SMOLLM2
from infopo_kernels.training.tokens import Example, tokenize
from infopo_kernels.training.trainer import Trainer

_INFOPO_ONLY: Final = ("max_log_weight", "min_log_weight", "sft_weight")

_DESCRIPTION: Final = """\
Tune a causal language model on preference pairs with InfoPO (or DPO), without ever forming its logits.

FILE holds one JSON object a line, in TRL's preference format:
  {"prompt": "...", "chosen": "...", "rejected": "..."}            strings, or
  {"prompt": [messages], "chosen": [messages], "rejected": [...]}  conversations, rendered by the chat template
without `prompt`, it is what `chosen` and `rejected` begin with.

OUTPUT gets the model (or the LoRA adapter) and tokenizer, metrics.jsonl and training.png."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `train`."""
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", required=True, help=f"directory, hub id, or {SMOLLM2!r} (the model of the demo)")
    parser.add_argument("--data", required=True, type=Path, metavar="FILE", help="preference pairs, JSONL")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where the result goes")
    parser.add_argument("--overwrite", action="store_true", help="write into an output directory that is not empty")
    parser.add_argument("--loss", choices=LOSSES, default="infopo", help="default: infopo")
    add_training_options(parser, steps=None, lr=1e-5)
    more = parser.add_argument_group("InfoPO, and lengths")
    more.add_argument("--max-log-weight", type=real, metavar="M", help="cap rejected weights at beta * exp(M)")
    more.add_argument("--min-log-weight", type=real, metavar="M", help="drop rejected weights below beta * exp(M)")
    more.add_argument("--sft-weight", type=real, metavar="A", help="add A * (-mean token log-probability of chosen)")
    more.add_argument("--average", action="store_true", help="mean over the tokens of a response instead of their sum")
    more.add_argument("--max-length", type=positive, default=1024, help="tokens, prompt and response (default: 1024)")
    more.add_argument(
        "--reference-logps", type=Path, metavar="FILE",
        help="what `precompute-reference` wrote for this model and data; the reference is not scored again then",
    )  # fmt: skip
    held = parser.add_argument_group("evaluation")
    held.add_argument("--held-out", type=natural, default=0, metavar="N", help="pairs of FILE to score, not train on")
    held.add_argument("--eval-data", type=Path, metavar="FILE", help="pairs to score, JSONL")
    held.add_argument("--eval-every", type=positive, metavar="STEPS", help="default: before and after only")
    lora = parser.add_argument_group("what is trained, and kept")
    lora.add_argument("--lora-rank", type=positive, metavar="R", help="LoRA on every linear layer but the head")
    lora.add_argument("--lora-alpha", type=positive_real, metavar="A", help="default: twice the rank")
    lora.add_argument("--merge-adapter", action="store_true", help="save the merged model instead of the adapter")
    lora.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations: less memory")
    lora.add_argument("--save-every", type=positive, metavar="STEPS", help="also save OUTPUT/checkpoint-STEP")
    lora.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def _check(args: argparse.Namespace) -> None:
    """What can be known to be wrong before anything is read."""
    for name in _INFOPO_ONLY:
        if args.loss == "dpo" and getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} has no meaning with --loss dpo; leave it out.")
    for name in ("lora_alpha", "merge_adapter"):
        if args.lora_rank is None and getattr(args, name):
            raise UserError(
                f"--{name.replace('_', '-')} has no meaning without --lora-rank; add it, or leave this out."
            )
    if args.held_out and args.eval_data is not None:
        raise UserError("--held-out and --eval-data were both given; pass one of them.")
    if args.eval_every is not None and not args.held_out and args.eval_data is None:
        raise UserError("--eval-every needs pairs to score; add --held-out N or --eval-data FILE.")


def _read(args: argparse.Namespace) -> tuple[list[Preference], list[Preference]]:
    pairs = read_preferences(args.data)
    if args.eval_data is not None:
        return pairs, read_preferences(args.eval_data)
    if args.held_out >= len(pairs):
        raise UserError(f"--held-out {args.held_out}: leaves nothing to train on, {args.data} has {len(pairs)} pairs.")
    kept, away = split_held_out(len(pairs), args.held_out, args.seed)
    return [pairs[i] for i in kept], [pairs[i] for i in away]


def _table(args: argparse.Namespace) -> ReferenceTable | None:
    """The file of `--reference-logps`, as far as it can be checked without the model."""
    if args.reference_logps is None:
        return None
    try:
        table = ReferenceTable.read(args.reference_logps)
        table.check_options(average=args.average, max_length=args.max_length, skip_chosen=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--reference-logps {error}") from None
    if table.header.skip_chosen and args.loss == "dpo":
        raise UserError(
            f"--reference-logps {table.path}: holds no chosen references, and DPO's gradients need them; compute it "
            f"again without --skip-chosen-reference."
        )
    return table


def _references(
    table: ReferenceTable, examples: list[Example], held_out: list[Example], named: str
) -> tuple[Tensor, Tensor | None]:
    """What the table says of both; None for held-out pairs of which it does not say all: those are scored anyway."""
    try:
        reference = _values(table, examples)
    except ValueError as error:
        raise UserError(f"--reference-logps {error} --data is {named}.") from None
    try:
        known = _values(table, held_out)
    except ValueError:
        return reference, None
    return reference, None if table.header.skip_chosen or not held_out else known


def main(args: argparse.Namespace, console: Console) -> None:
    """Read, check, load, train, save, report.

    Raises:
        UserError: something that the user can put right.
    """
    _check(args)
    infopo = infopo_options(args)
    load = loading(args)
    table = _table(args)
    pairs, held_out_pairs = _read(args)
    output = output_directory(args.output, overwrite=args.overwrite)

    tokenizer = load_tokenizer(args.model, load)
    data = tokenize(tokenizer, pairs, args.max_length)
    held_out = tokenize(tokenizer, held_out_pairs, args.max_length).examples if held_out_pairs else []
    if data.truncated or data.dropped:
        console.print(
            f"--max-length {args.max_length}: {data.truncated} pairs were cut at the end, {data.dropped} left out "
            f"because nothing to compare was left of them."
        )
    reference = held_out_reference = None
    if table is not None:
        reference, held_out_reference = _references(table, data.examples, held_out, str(args.data))
    steps = args.steps or math.ceil(len(data.examples) / (args.batch * args.accumulate))
    skip_chosen = table is not None and table.header.skip_chosen
    options = replace(train_options(args, steps=steps), skip_chosen_reference=skip_chosen)
    policy = Policy.load(args.model, load, kernel_options(args), tokenizer)
    policy.check_examples(data.examples)
    if table is not None:
        try:
            table.check_model(policy.model)
        except ValueError as error:
            raise UserError(f"--reference-logps {error}") from None
    console.print(
        f"{TITLES[args.loss]} on {len(data.examples)} pairs ({len(held_out)} held out): {steps} steps of "
        f"{args.batch * args.accumulate} pairs, lr {args.lr:g}, beta {infopo.beta:g}, {args.dtype} on {load.device}.",
        highlight=False,
    )
    if skip_chosen:
        console.print(
            f"{args.reference_logps} holds no chosen references: gradients are the same, the loss is shifted by a "
            f"constant; while training, the chosen log-ratio, rewards and the bound are not known (null in "
            f"metrics.jsonl).",
            highlight=False, soft_wrap=True,
        )  # fmt: skip

    def after_step(step: int) -> None:
        if args.save_every and step % args.save_every == 0 and step < steps:
            policy.save(output / f"checkpoint-{step}")

    with closing(MetricsFile(output / "metrics.jsonl")) as metrics, Progress(console) as progress:
        history = run(
            [Trainer(policy, options)], data.examples, held_out, progress, metrics,
            reference=reference, held_out_reference=held_out_reference,
            eval_every=args.eval_every, after_step=after_step,
        )  # fmt: skip
    policy.save(output, merge_adapter=args.merge_adapter)
    title = f"{TITLES[args.loss]}, {args.model}"
    plot_history(history, [args.loss], output / "training.png", title=title, average=infopo.average)
    console.print(result_table(history, [args.loss], average=infopo.average))
    console.print(f"Model, metrics.jsonl and training.png are in {output}.", highlight=False)
