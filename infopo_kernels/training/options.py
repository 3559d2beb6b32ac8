"""Command-line options that `train` and `demo` share, and what they make."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from infopo_kernels.objectives import InfoPOOptions
from infopo_kernels.options import BACKENDS, KernelOptions
from infopo_kernels.training.errors import UserError
from infopo_kernels.training.policy import Loading
from infopo_kernels.training.trainer import SCHEDULES, TrainOptions

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def positive(text: str) -> int:
    """A whole number from 1."""
    return _at_least(1, text)


def natural(text: str) -> int:
    """A whole number from 0."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected a whole number from {least}, got {text!r}")
    return value


def real(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


def positive_real(text: str) -> float:
    """A finite number above 0."""
    value = real(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = real(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return value


def add_training_options(parser: argparse.ArgumentParser, *, steps: int | None, lr: float) -> None:
    """Options of the objective, the optimiser and the machine."""
    objective = parser.add_argument_group("objective")
    objective.add_argument("--beta", type=positive_real, default=0.1, help="scale of the log-ratio (default: 0.1)")
    objective.add_argument(
        "--offset", type=real, default=1.0, help="constant inside InfoPO's exponential: 1 is the NWJ bound (default: 1)"
    )
    optimiser = parser.add_argument_group("optimiser (AdamW)")
    optimiser.add_argument("--lr", type=positive_real, default=lr, help=f"peak learning rate (default: {lr:g})")
    optimiser.add_argument(
        "--steps",
        type=positive,
        default=steps,
        help=f"optimiser steps (default: {steps if steps is not None else 'once through the data'})",
    )
    optimiser.add_argument("--batch", type=positive, default=4, help="pairs in a batch (default: 4)")
    optimiser.add_argument("--accumulate", type=positive, default=1, help="batches in an optimiser step (default: 1)")
    optimiser.add_argument("--warmup", type=share, default=0.1, help="share of the steps that warm up (default: 0.1)")
    optimiser.add_argument("--schedule", choices=SCHEDULES, default="linear", help="decay (default: linear)")
    optimiser.add_argument("--weight-decay", type=real, default=0.0, help="default: 0")
    optimiser.add_argument(
        "--max-grad-norm", type=positive_real, default=1.0, help="gradients are clipped (default: 1)"
    )
    optimiser.add_argument("--seed", type=natural, default=0, help="of order and split (default: 0)")
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--dtype", choices=sorted(_DTYPES), default="float32",
        help="of activations and products; weights that are trained stay in float32 (default: float32)",
    )  # fmt: skip
    machine.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    machine.add_argument("--backend", choices=BACKENDS, default="auto", help="of the fused op (default: auto)")
    machine.add_argument(
        "--workspace-mib", type=positive, help="bound on the op's workspace (default: 32, on a GPU 256)"
    )


def infopo_options(args: argparse.Namespace) -> InfoPOOptions:
    """The objective that the options say.

    Raises:
        UserError: they do not go together.
    """
    names = ("beta", "offset", "max_log_weight", "min_log_weight", "sft_weight", "average")
    given: dict[str, Any] = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    try:
        return InfoPOOptions(**given)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from None


def train_options(args: argparse.Namespace, *, steps: int) -> TrainOptions:
    """The loop that the options say; `steps` is already decided."""
    return TrainOptions(
        loss=args.loss,
        infopo=infopo_options(args),
        lr=args.lr,
        steps=steps,
        batch=args.batch,
        accumulate=args.accumulate,
        warmup=args.warmup,
        schedule=args.schedule,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
    )


def loading(args: argparse.Namespace) -> Loading:
    """How the model is loaded.

    Raises:
        UserError: there is no such device.
    """
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {args.device}: {reason} Pass --device cpu, or a device that is here.") from None
    return Loading(
        dtype=_DTYPES[args.dtype],
        device=device,
        lora_rank=getattr(args, "lora_rank", None),
        lora_alpha=getattr(args, "lora_alpha", None),
        gradient_checkpointing=getattr(args, "gradient_checkpointing", False),
        trust_remote_code=getattr(args, "trust_remote_code", False),
    )


def kernel_options(args: argparse.Namespace) -> KernelOptions:
    """Backend and workspace."""
    return KernelOptions(args.backend, args.workspace_mib)


def output_directory(path: Path, *, overwrite: bool) -> Path:
    """An output directory that can be written, made now rather than after hours of training.

    Raises:
        UserError: it holds something already, or cannot be made.
    """
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(f"--output {path}: is not empty; pass another directory, or --overwrite to write into it.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {path}: cannot be made: {error.strerror}.") from None
    return path
