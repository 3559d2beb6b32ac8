"""Reference log-probabilities ahead of time: the file that holds them, and the command that writes it.

    python -m infopo_kernels precompute-reference --model DIR_OR_ID --data pairs.jsonl --output pairs.reference.jsonl

The file is JSON lines. The first says what was computed: fingerprints of model and data, length limit, sums or means.
Each other line is a pair: the key of its token ids, and the two log-probabilities (nats; null for a chosen response
that was skipped). Pairs are found by key, so that a dataset may be shuffled, filtered or split after it was scored.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

_FORMAT: Final = "infopo_kernels.reference_logps"
_VERSION: Final = 1
_SAMPLES: Final = 1024
"""Values of each parameter that enter a model's fingerprint: any update touches all of them, a swap of checkpoints too;
70B parameters are read in a second."""


@dataclass(frozen=True)
class Header:
    """What the values of a file mean."""

    model: str
    """Fingerprint of the weights."""
    data: str
    """Fingerprint of the pairs, in their order."""
    pairs: int
    max_length: int | None
    average: bool
    """Means over the tokens of a response instead of sums."""
    skip_chosen: bool
    format: str = _FORMAT
    version: int = _VERSION


def model_fingerprint(model: Any) -> str:
    """Hash of names, shapes and a sample of the values of a model's weights; adapters do not count.

    The sample is rounded to bfloat16 first: one checkpoint has one fingerprint, in whatever type it is loaded.

    Raises:
        ValueError: the weights are not here (on the meta device, or partitioned by ZeRO-3).
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in causal.named_parameters():
        if "lora_" in name or ".modules_to_save." in name:
            continue
        if parameter.is_meta or parameter.numel() == 0:
            raise ValueError(f"the weights of {type(causal).__name__} are not here ({name}); load them unsharded.")
        plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        digest.update(f"{plain} {list(parameter.shape)}".encode())
        values = parameter.detach().reshape(-1)
        count = min(_SAMPLES, values.numel())  # in integers: a float32 index is wrong beyond 2^24 values
        chosen = torch.arange(count, device=values.device) * (values.numel() - 1) // max(1, count - 1)
        sample = values[chosen].to(torch.bfloat16).view(torch.int16).cpu()
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def pair_key(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int], max_length: int | None) -> str:
    """Key of a pair: hash of its token ids, the responses cut where `max_length` tokens end."""
    if max_length is not None:
        room = max(0, max_length - len(prompt))
        chosen, rejected = chosen[:room], rejected[:room]
    ids = json.dumps([list(prompt), list(chosen), list(rejected)], separators=(",", ":"))
    return hashlib.blake2b(ids.encode(), digest_size=12).hexdigest()


def _scorable(example: Any) -> bool:
    """Whether both responses have a token to score; without a prompt the first one has nothing to be scored by."""
    return min(len(example.chosen), len(example.rejected)) > (0 if example.prompt else 1)


def data_fingerprint(keys: Iterable[str]) -> str:
    """Hash of the keys of all pairs."""
    return hashlib.blake2b("".join(keys).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class ReferenceTable:
    """Reference log-probabilities by pair."""

    path: str
    header: Header
    values: dict[str, tuple[float | None, float]]
    """Chosen and rejected, by key."""

    @classmethod
    def read(cls, path: str | Path) -> ReferenceTable:
        """A complete file.

        Raises:
            ValueError: it is none, or the command that writes it was cut short.
        """
        try:
            header, values, _ = _read(Path(path))
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file; write it with `{_COMMAND} --output {path}`.") from None
        table = cls(str(path), header, values)
        if data_fingerprint(values) != header.data or len(values) != header.pairs:
            raise ValueError(
                f"{path}: holds {len(values)} of {header.pairs} pairs; run the command that wrote it again to finish."
            )
        return table

    def check_model(self, model: Any) -> None:
        """Raise ValueError unless these are log-probabilities of this model (of its base, if it has an adapter)."""
        found = model_fingerprint(model)
        if found != self.header.model:
            raise ValueError(
                f"{self.path}: was computed with another model (fingerprint {self.header.model}, not {found}); "
                f"use the model that training starts from, or compute the reference again."
            )

    def check_options(self, *, average: bool, max_length: int | None, skip_chosen: bool) -> None:
        """Raise ValueError unless the values mean what training takes them for."""
        header = self.header
        for name, ours, theirs in (("average", average, header.average), ("max_length", max_length, header.max_length)):
            if ours != theirs:
                raise ValueError(
                    f"{self.path}: was computed with {name}={theirs}, training has {name}={ours}; make them equal."
                )
        if header.skip_chosen and not skip_chosen:
            raise ValueError(
                f"{self.path}: holds no chosen references; train with skip_chosen_reference=True, or compute it again "
                f"without --skip-chosen-reference."
            )

    def lookup(self, row: dict[str, Any]) -> dict[str, float | None]:
        """`ref_chosen_logps` and `ref_rejected_logps` of a row with `prompt_ids`, `chosen_ids` and `rejected_ids`.

        Raises:
            ValueError: the pair is not in the file.
        """
        key = pair_key(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"], self.header.max_length)
        if key not in self.values:
            raise ValueError(
                f"{self.path}: a pair of the data is not in it (prompt of {len(row['prompt_ids'])} tokens, key {key}); "
                f"was it computed from other pairs, or with another tokenizer or chat template?"
            )
        chosen, rejected = self.values[key]
        return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def of_examples(self, examples: Iterable[Any]) -> Tensor:
        """[E, 2] float64, chosen and rejected (NaN where skipped), of examples with `prompt`, `chosen`, `rejected`."""
        rows = [self.lookup({"prompt_ids": e.prompt, "chosen_ids": e.chosen, "rejected_ids": e.rejected})
                for e in examples]  # fmt: skip
        return torch.tensor(
            [[torch.nan if value is None else value for value in row.values()] for row in rows], dtype=torch.float64
        )


_COMMAND: Final = "python -m infopo_kernels precompute-reference --model ... --data ..."


def _read(path: Path) -> tuple[Header, dict[str, tuple[float | None, float]], int]:
    """Header, values, and the bytes that hold whole lines: a run that was killed may leave part of one."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    lines = content[:whole].splitlines()
    try:
        header = Header(**json.loads(lines[0]))
        rows = [json.loads(line) for line in lines[1:]]
        values = {row["key"]: (row["chosen"], row["rejected"]) for row in rows}
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: is not a file of reference log-probabilities ({error}).") from None
    if (header.format, header.version) != (_FORMAT, _VERSION):
        raise ValueError(f"{path}: has format {header.format} {header.version}, expected {_FORMAT} {_VERSION}.")
    return header, values, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `precompute-reference`."""
    from infopo_kernels.options import BACKENDS
    from infopo_kernels.training.options import positive

    parser.description = (
        "Score preference pairs with the model that training starts from, once, so that training needs no reference "
        "model. A run that was killed goes on where it was when it is started again."
    )
    parser.add_argument("--model", required=True, help="directory or hub id of the reference")
    parser.add_argument("--data", required=True, type=Path, metavar="FILE", help="preference pairs, JSONL")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: beside the data, FILE.reference.jsonl")
    parser.add_argument("--overwrite", action="store_true", help="replace a file made from another model or data")
    parser.add_argument("--max-length", type=positive, default=1024, help="as in training (default: 1024)")
    parser.add_argument("--average", action="store_true", help="means over the tokens, as in training")
    parser.add_argument("--skip-chosen-reference", action="store_true", help="rejected responses only: half the work")
    parser.add_argument("--batch", type=positive, default=8, help="pairs that are scored at once (default: 8)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="as in training")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="of the fused op (default: auto)")
    parser.add_argument("--workspace-mib", type=positive, help="bound on the op's workspace")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def run(args: argparse.Namespace, console: Any) -> Path:
    """Read, check, load, score; the path of the file.

    Raises:
        UserError: something that the user can put right.
    """
    from infopo_kernels.training.data import read_preferences
    from infopo_kernels.training.errors import UserError
    from infopo_kernels.training.options import kernel_options, loading
    from infopo_kernels.training.policy import Policy, load_tokenizer
    from infopo_kernels.training.progress import Progress
    from infopo_kernels.training.tokens import cut, encode

    load = loading(args)
    pairs = read_preferences(args.data)
    tokenizer = load_tokenizer(args.model, load)
    # Every pair of which both responses have a token left: trainers differ in which of those they drop.
    kept = (cut(encode(tokenizer, pair), args.max_length) for pair in pairs)
    unique = {pair_key(e.prompt, e.chosen, e.rejected, None): e for e in kept if _scorable(e)}
    if not unique:
        raise UserError(f"no pair has a response within --max-length {args.max_length}; raise the limit.")
    policy = Policy.load(args.model, load, kernel_options(args), tokenizer)
    policy.check_examples(list(unique.values())[:1])
    policy.model.eval()
    header = Header(
        model=model_fingerprint(policy.model), data=data_fingerprint(unique), pairs=len(unique),
        max_length=args.max_length, average=args.average, skip_chosen=args.skip_chosen_reference,
    )  # fmt: skip
    path = args.output or args.data.with_suffix(".reference.jsonl")
    done = 0
    if path.exists() and not args.overwrite:
        try:
            found, values, whole = _read(path)
        except ValueError as error:
            raise UserError(f"--output {error} Pass another path, or --overwrite.") from None
        if differing := [name for name, value in asdict(header).items() if asdict(found)[name] != value]:
            raise UserError(
                f"--output {path}: was made from another {', '.join(differing)}; pass another path, or --overwrite."
            )
        done = len(values)
        os.truncate(path, whole)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(header)) + "\n", encoding="utf-8")
    # The file's order is the data's, so that what is done is a prefix.
    keys, examples = list(unique)[done:], list(unique.values())[done:]
    if done:
        console.print(f"{path} holds {done} of {len(unique)} pairs already.", highlight=False)
    with (
        path.open("a", encoding="utf-8") as file,
        Progress(console) as progress,
        progress.stage("Reference log-probabilities", len(keys)) as advance,
    ):
        for start in range(0, len(keys), args.batch):
            part = slice(start, start + args.batch)
            logps = _score(policy, examples[part], args.average, args.skip_chosen_reference)
            for key, (chosen, rejected) in zip(keys[part], logps, strict=True):
                file.write(json.dumps({"key": key, "chosen": chosen, "rejected": rejected}) + "\n")
            file.flush()
            advance(len(logps))
    console.print(f"{len(unique)} pairs are in {path}.", highlight=False)
    result: Path = path
    return result


@torch.no_grad()
def _score(policy: Any, examples: Sequence[Any], average: bool, skip_chosen: bool) -> list[tuple[float | None, float]]:
    from infopo_kernels.training.batches import Batch, collate

    batch = collate(examples, policy.pad_token_id, policy.loading.device)
    if skip_chosen:
        B = batch.num_pairs
        rejected = Batch(batch.input_ids[B:], batch.attention_mask[B:], batch.labels[B:])
        return [(None, value) for value in policy.logps(rejected, average).tolist()]
    return [(chosen, rejected) for chosen, rejected in policy.logps(batch, average).reshape(2, -1).T.tolist()]


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m infopo_kernels precompute-reference`; the exit code: 0, 2 for bad input, 130 if interrupted."""
    from rich.console import Console

    from infopo_kernels.training.errors import UserError

    parser = argparse.ArgumentParser(prog="python -m infopo_kernels precompute-reference")
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        run(args, Console(width=None if sys.stdout.isatty() else 120))
    except UserError as error:
        print(f"precompute-reference: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("precompute-reference: interrupted; start it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
