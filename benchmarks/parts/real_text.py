"""Steps on real text: the time and the error of a pooled tail, beside exact steps of this library and of others.

    python -m benchmarks real-text [--dtypes bfloat16] [--rounds 5]

Hidden states and labels are those of SmolLM2-135M-Instruct on the demo's pairs, so probabilities are as peaked as in
training. Errors are relative to float32 gradients: |error| / |gradient|. On a CPU Cut Cross-Entropy has no filter; its
filter drops probabilities on a GPU. Repetitions are interleaved, and figures are medians. The last case has the random
weights of the other benchmarks, where nearly every column is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any, ClassVar, Final

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import records, report
from benchmarks.cases import CASES, DTYPES, MAIN_SHAPE, SHAPES, Batch, make_batch
from benchmarks.contenders import CONTENDERS, OURS, Contender, Ours
from benchmarks.measure.environment import environment
from benchmarks.measure.timing import interleave
from benchmarks.plan import among
from benchmarks.truth import relative_error, run, truth
from infopo_kernels.commands.demo.word_problems import word_problems
from infopo_kernels.commands.smollm2 import smollm2_directory
from infopo_kernels.functional import linear_infopo_loss
from infopo_kernels.integrations.collators import PreferenceCollator
from infopo_kernels.integrations.preferences import preference_features
from infopo_kernels.options import IGNORE_INDEX
from infopo_kernels.output import TailSummary

RECORD = "real-text"
EXPONENT = 13
OTHER_EXPONENTS = (12, 14)
ROOM = 128
PEERS = ("naive PyTorch", "torch.compile", "F.linear_cross_entropy", "Cut Cross-Entropy")
ROUNDS = 5
_PAIRS: Final = 14  # 1,180 scored tokens
_CPU = torch.device("cpu")


class Setting(Ours):
    """This library with options of its kernel; with a threshold it reports what was pooled."""

    options: ClassVar[dict[str, Any]]

    def report(self, batch: Batch) -> tuple[Tensor, TailSummary | None]:
        """The loss and what was pooled."""
        out = linear_infopo_loss(
            batch.hidden, batch.weight, batch.labels, cu_seqlens=self._bounds(batch), is_chosen=batch.is_chosen,
            beta=batch.beta, average=True, report_tail="tail_threshold" in self.options, **self.options,
        )  # fmt: skip
        return out.loss, out.tail

    def loss(self, batch: Batch) -> Tensor:
        return self.report(batch)[0]


def setting(exponent: int | None = EXPONENT, workspace_mib: int | None = None) -> Setting:
    """With the threshold 2^-exponent, or with more memory."""
    wide = {} if workspace_mib is None else {"workspace_mib": workspace_mib}
    pooled = {} if exponent is None else {"tail_threshold": 2.0**-exponent}
    words = [f"tail pooled below 2^-{exponent}"] if pooled else []
    words += [f"{workspace_mib} MiB"] if wide else []

    class Own(Setting):
        name = f"{OURS}, {', '.join(words)}"
        setting = f"`linear_infopo_loss(..., {', '.join(f'{k}={v}' for k, v in (pooled | wide).items())})`"
        options: ClassVar[dict[str, Any]] = pooled | wide

    return Own()


def real_batch(dtype: torch.dtype) -> Batch:
    """The scored rows of `_PAIRS` pairs, packed, chosen first."""
    directory = str(smollm2_directory())
    rows = [pair.row() for pair in word_problems(_PAIRS, 0)]
    batch = PreferenceCollator()(preference_features(AutoTokenizer.from_pretrained(directory), rows, 512))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        states = torch.cat(
            [
                model.model(input_ids=i, attention_mask=m).last_hidden_state
                for i, m in zip(ids.split(2), mask.split(2), strict=True)
            ]
        )
    labels = batch["labels"][:, 1:]
    scored = labels != IGNORE_INDEX
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), scored.sum(1).cumsum(0)])
    hidden, weight = states[:, :-1][scored].to(dtype), model.lm_head.weight.detach().to(dtype)
    case = CASES["packed"]
    return Batch(case, hidden.requires_grad_(), weight.requires_grad_(), labels[scored], bounds, case.beta)


def _frozen(batch: Batch) -> Batch:
    case = CASES["frozen"]
    hidden, weight = batch.hidden.detach().requires_grad_(), batch.weight.detach()
    packed = type(case)(case.name, case.text, case.trained, packed=batch.case.packed)
    return Batch(packed, hidden, weight, batch.labels, batch.cu_seqlens, batch.beta)


def measure(what: str, batch: Batch, contenders: Sequence[Contender], rounds: int) -> list[dict[str, Any]]:
    """A row for each contender: seconds, their ratio to this library's exact step, errors, and what was pooled."""
    right = truth(batch, torch.float32)
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for contender in contenders:
        if contender.unsupported_reason(batch.case, _CPU, batch.hidden.dtype) is not None:
            continue
        run(contender, batch)
        row: dict[str, Any] = {"case": what, "contender": contender.name, "tokens": len(batch.labels)}
        for name, gradient in right.gradients.items():
            row[f"error_{name}"] = relative_error(getattr(batch, name).grad, gradient)
        if isinstance(contender, Setting) and (pooled := contender.report(batch)[1]) is not None:
            row |= {name: float(value) for name, value in pooled._asdict().items()}
        rows[contender.name], calls[contender.name] = row, partial(run, contender, batch)
    each = interleave(calls, rounds, float("inf"), _CPU)
    exact = median(each[OURS])
    return [
        row | {"seconds": median(each[n]), "ratio": median(each[n]) / exact, "each": each[n]} for n, row in rows.items()
    ]


def table(record: records.Record) -> report.Table:
    """Time over this library's exact step, and errors."""
    rows = []
    for row in record.rows.to_dict("records"):
        errors = [f"{row[key]:.1e}" if row.get(key) == row.get(key) else "" for key in ("error_hidden", "error_weight")]
        pooled = row.get("kept_share") == row.get("kept_share")
        tail = [f"{row['mass_mean']:.1e} / {row['mass_max']:.2g}", f"{row['kept_share']:.1%}"] if pooled else ["", ""]
        rows.append([row["case"], row["contender"], f"{row['ratio']:.2f}", *errors, *tail])
    m = record.machine
    torch_version = m["versions"]["torch"]
    title = f"{MAIN_SHAPE}, {m['cpu']}, {m['threads']} threads, torch {torch_version}; medians in one run."
    heads = [
        "case",
        "implementation",
        "time / exact",
        "error of dX",
        "error of dW",
        "pooled mass, mean / max",
        "columns kept",
    ]
    return report.Table(record.part, title, heads, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the record, show the table."""
    parser = records.parser(RECORD, __doc__)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args(argv)
    console, machine, record = report.console(), environment(), None
    ours = [CONTENDERS[OURS], setting()]
    for dtype in among("dtypes", args.dtypes, ("float32", "bfloat16")):
        batch = real_batch(DTYPES[dtype])
        others = [setting(exponent) for exponent in OTHER_EXPONENTS]
        if DTYPES[dtype].itemsize == 2:  # room for the logits of all rows, which spares the second product for them
            others += [setting(None, ROOM), setting(EXPONENT, ROOM)]
        peers = [CONTENDERS[name] for name in PEERS]
        found = measure(f"step, {dtype}", batch, [*ours, *others, *peers], args.rounds)
        found += measure(f"frozen, {dtype}", _frozen(batch), ours, args.rounds)
        noise = make_batch(CASES["step"], SHAPES[MAIN_SHAPE], 2, 256, DTYPES[dtype], _CPU)
        found += measure(f"random weights, {dtype}", noise, ours, args.rounds)
        record = records.merge(args.output, RECORD, machine, found, by=("case", "contender"), rounds=args.rounds)
    assert record is not None
    report.render(console, [table(record)])
    return 0
