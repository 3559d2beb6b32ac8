"""Reference log-probabilities ahead of time: their file, and the identity of their model.

The file is JSON lines, written by `python -m infopo_kernels precompute-reference`. The first line is the header: the
values' meaning, model, adapter and type. Each other line is a pair: the key of its token ids, and the log-probabilities
of its responses (nats; null for a skipped chosen one, a list for several rejected ones). Pairs are found by key, so you
may shuffle, filter, split or stream a dataset after it was scored.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from infopo_kernels.integrations.adapters import adapters_of, changes_model, whole
from infopo_kernels.integrations.preferences import Feature, PreferenceWarning, cut, lists_rejected, rejected_responses

FORMAT: Final = "infopo_kernels.reference_logps"
VERSION: Final = 2
COMMAND: Final = "python -m infopo_kernels precompute-reference --model ... --data ..."

_SAMPLES: Final = 1024
"""Values of each parameter in a model's fingerprint: every update changes all of them, and so does another checkpoint.
70B parameters are read in a second."""

Values = tuple["float | None", tuple[float, ...]]
"""The log-probability of the chosen response (None: skipped), and those of the rejected ones, nats."""


@dataclass(frozen=True)
class Header:
    """What the values of a file mean."""

    model: str
    """Fingerprint of the weights, without those of an adapter."""
    adapter: str | None
    """Type and fingerprint of the adapter that was on ("LORA 1f0c..."); None for none, or one that changes nothing."""
    dtype: str
    """Type in which the model computed: "float32", "bfloat16"."""
    data: str
    """Fingerprint of the pairs, in their order."""
    pairs: int
    max_length: int | None
    average: bool
    """Means over the tokens of a response instead of sums."""
    skip_chosen: bool
    format: str = FORMAT
    version: int = VERSION


def model_identity(model: Any) -> tuple[str, str | None]:
    """Fingerprints of a model: of its own weights; and type and fingerprint of the adapter that changes it, else None.

    A fingerprint is a hash of names, shapes and a sample of the values. The sample is rounded to bfloat16 first: one
    checkpoint has one fingerprint, in whatever type it is loaded. An adapter that is off, or fresh (it leaves the model
    as it was), does not count; a learned prompt that is on always does. ZeRO-3's and FSDP2's partitioned weights are
    gathered one after the other; every rank has to call this then.

    Raises:
        ValueError: the weights are not here (on the meta device), or see `adapters.changes_model`.
    """
    adapters = adapters_of(model)
    base = _digest(adapters.base, type(model).__name__)
    if not changes_model(model, adapters):
        return base, None
    scales = [
        f"scaling={layer.scaling[name]}"
        for layer in adapters.layers
        if isinstance(getattr(layer, "scaling", None), dict)
        for name in getattr(layer, "active_adapters", ())
        if name in layer.scaling
    ]
    return base, f"{'+'.join(adapters.kinds)} {_digest(adapters.active, type(model).__name__, *scales)}"


def model_fingerprint(model: Any) -> str:
    """One word for a model: see `model_identity`; that of the base where no adapter counts.

    Raises:
        ValueError: see `model_identity`.
    """
    base, adapter = model_identity(model)
    return base if adapter is None else hashlib.blake2b(f"{base} {adapter}".encode(), digest_size=16).hexdigest()


def same_start(model: Any, reference: Any) -> bool:
    """Whether the reference holds the weights that the policy starts from; unknown counts as so."""
    try:
        return model_identity(model) == model_identity(reference)
    except ValueError:  # weights that are not here
        return True


def _digest(parameters: Iterable[tuple[str, Tensor]], kind: str, *more: str) -> str:
    digest = hashlib.blake2b("".join(more).encode(), digest_size=16)
    for name, parameter in parameters:
        with whole(parameter) as value:
            if value.is_meta or value.numel() == 0:
                raise ValueError(f"the weights of {kind} are not here ({name}); load them unsharded.")
            digest.update(f"{name} {list(value.shape)}".encode())
            values = value.reshape(-1)
            count = min(_SAMPLES, values.numel())  # in integers: a float32 index is wrong beyond 2^24 values
            chosen = torch.arange(count, device=values.device) * (values.numel() - 1) // max(1, count - 1)
            sample = values[chosen].to(torch.bfloat16).view(torch.int16).cpu()
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def pair_key(feature: Feature, max_length: int | None = None) -> str:
    """Key of a pair: hash of its token ids and of what is not scored, cut where `max_length` tokens end."""
    feature = cut(feature, max_length)
    rejected = rejected_responses(feature)
    parts = [list(feature["prompt_ids"]), list(feature["chosen_ids"]), *map(list, rejected)]
    if (chosen_mask := feature.get("chosen_mask")) is not None:
        masks = [list(chosen_mask), *map(list, rejected_responses(feature, "rejected_mask"))]
        if not all(map(all, masks)):
            parts += masks
    ids = json.dumps(parts, separators=(",", ":"))
    return hashlib.blake2b(ids.encode(), digest_size=12).hexdigest()


def data_fingerprint(keys: Iterable[str]) -> str:
    """Hash of the keys of all pairs."""
    return hashlib.blake2b("".join(keys).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class ReferenceTable:
    """Reference log-probabilities by pair."""

    path: str
    header: Header
    values: dict[str, Values]
    """By key (see `pair_key`)."""

    @classmethod
    def read(cls, path: str | Path) -> ReferenceTable:
        """A complete file.

        Raises:
            ValueError: it is none, or the command that writes it was cut short.
        """
        try:
            header, values, _ = read_part(Path(path))
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file; write it with `{COMMAND} --output {path}`.") from None
        table = cls(str(path), header, values)
        if data_fingerprint(values) != header.data or len(values) != header.pairs:
            raise ValueError(
                f"{path}: holds {len(values)} of {header.pairs} pairs; run the command that wrote it again to finish."
            )
        return table

    def check_model(self, model: Any) -> None:
        """Raise ValueError unless these are values of this model, with the adapter that changes it if it has one."""
        base, adapter = model_identity(model)
        if base != self.header.model:
            raise ValueError(
                f"{self.path}: was computed with another model (fingerprint {self.header.model}, not {base}); "
                f"use the model that training starts from, or compute the reference again."
            )
        if adapter != self.header.adapter:
            ours = "the model has none that is on and changes it" if adapter is None else f"the model has {adapter}"
            theirs = "without an adapter" if self.header.adapter is None else f"with the adapter {self.header.adapter}"
            raise ValueError(
                f"{self.path}: was computed {theirs}, and {ours}; the reference is the model that training starts "
                f"from, its adapter included: start from that one, or compute the reference again."
            )

    def check_options(
        self, *, average: bool, max_length: int | None, skip_chosen: bool, dtype: torch.dtype | None = None
    ) -> None:
        """Raise ValueError unless the values mean what training takes them for.

        `dtype`: type in which the policy computes (that of autocast, else of its weights). Another one than the file's
        is said in a `PreferenceWarning`: log-ratios begin with the difference between the two types' rounding then.
        """
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
        if dtype is not None and type_name(dtype) != header.dtype:
            warnings.warn(
                f"{self.path}: was computed in {header.dtype}, and the policy computes in {type_name(dtype)}: "
                f"log-ratios are off by the difference of their rounding (some 0.1 nats a response in bfloat16), "
                f"already at the first step, where 0 is right. Compute the reference in {type_name(dtype)}.",
                PreferenceWarning,
                stacklevel=2,
            )

    def lookup(self, feature: Feature) -> dict[str, Any]:
        """`ref_chosen_logps` and `ref_rejected_logps` of a feature (see `infopo_kernels.integrations.preferences`).

        Goes into ``dataset.map(table.lookup)``, of a `Dataset` or a stream.

        Returns:
            The first a float, or None where it was skipped; the second a float, or a list of floats where the feature
            lists its rejected responses.

        Raises:
            ValueError: the pair is not in the file.
        """
        key = pair_key(feature, self.header.max_length)
        if key not in self.values:
            raise ValueError(
                f"{self.path}: a pair of the data is not in it (prompt of {len(feature['prompt_ids'])} tokens, key "
                f"{key}); was it computed from other pairs, or with another tokenizer, chat template or `score_turns`?"
            )
        chosen, rejected = self.values[key]
        several = list(rejected) if lists_rejected(feature) else rejected[0]
        return {"ref_chosen_logps": chosen, "ref_rejected_logps": several}


def type_name(dtype: torch.dtype) -> str:
    """ "float32" for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def pair_line(key: str, values: Values) -> str:
    """The line of a pair."""
    chosen, rejected = values
    return (
        json.dumps({"key": key, "chosen": chosen, "rejected": rejected[0] if len(rejected) == 1 else rejected}) + "\n"
    )


def read_part(path: Path) -> tuple[Header, dict[str, Values], int]:
    """Header, values, and the bytes that hold whole lines: a run that was killed may leave part of one.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: it is no file of this format.
    """
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    lines = content[:end].splitlines()
    try:
        first = json.loads(lines[0])
        found = first["format"], first["version"]
        if found == (FORMAT, VERSION):
            header = Header(**first)
        rows = [json.loads(line) for line in lines[1:]]
        values: dict[str, Values] = {
            row["key"]: (
                row["chosen"],
                tuple(row["rejected"]) if isinstance(row["rejected"], list) else (row["rejected"],),
            )
            for row in rows
        }
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: is not a file of reference log-probabilities ({error}).") from None
    if found != (FORMAT, VERSION):
        raise ValueError(
            f"{path}: has format {found[0]} {found[1]}, expected {FORMAT} {VERSION}; compute the reference again."
        )
    return header, values, end
