"""The training step and the run around it, against the same steps in plain PyTorch."""

from __future__ import annotations

import copy
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from infopo_kernels.objectives import InfoPOOptions
from infopo_kernels.training.batches import collate, split_held_out, visiting_order
from infopo_kernels.training.errors import UserError
from infopo_kernels.training.loop import History, run
from infopo_kernels.training.metrics import MetricsFile, pair_metrics
from infopo_kernels.training.progress import Progress
from infopo_kernels.training.trainer import SCHEDULES, Trainer, TrainOptions, all_logps, evaluation, rate_factor

from .test_training_policy import own_logps
from .training_fixtures import examples, policy, tiny_model

CPU = torch.device("cpu")
OBJECTIVES = [
    TrainOptions(loss="infopo"),
    TrainOptions(loss="infopo", infopo=InfoPOOptions(beta=1.0, max_log_weight=0.5, sft_weight=0.3, average=True)),
    TrainOptions(loss="dpo"),
    TrainOptions(loss="dpo", infopo=InfoPOOptions(beta=1.0, average=True)),
]


def plain_loss(logps: torch.Tensor, ref: torch.Tensor, means: torch.Tensor, options: TrainOptions) -> torch.Tensor:
    """The two losses as their papers write them."""
    o = options.infopo
    reward = o.beta * (logps - ref)
    chosen, rejected = reward.chunk(2)
    if options.loss == "dpo":
        return -torch.log(torch.sigmoid(chosen - rejected)).mean()
    exponent = rejected - o.offset
    growth = exponent.exp()
    if o.max_log_weight is not None:
        m = o.max_log_weight
        growth = torch.where(exponent <= m, growth, math.exp(m) * (1 + exponent - m))
    return (-chosen + growth - o.sft_weight * means.chunk(2)[0]).mean()


@pytest.mark.parametrize("options", OBJECTIVES, ids=lambda o: f"{o.loss}-{'mean' if o.infopo.average else 'sum'}")
def test_five_steps_are_those_of_a_plain_loop(options: TrainOptions) -> None:
    options = replace(options, lr=3e-3, steps=5, batch=3)
    fused_model = tiny_model()
    model = copy.deepcopy(fused_model)
    trainer = Trainer(policy(fused_model), options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=0.0)
    average = options.infopo.average
    for step in range(options.steps):
        batch = collate(examples(3, seed=step), 0, CPU)
        with torch.no_grad():
            ref = own_logps(tiny_model(seed=1), batch, average)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rate_factor(step, options)
        optimizer.zero_grad()
        loss = plain_loss(own_logps(model, batch, average), ref, own_logps(model, batch, True), options)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)
        optimizer.step()
        metrics = trainer.step([(batch, ref)])
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-4)
        assert metrics["gradient_norm"] == pytest.approx(norm.item(), rel=1e-3)
    for mine, theirs in zip(fused_model.parameters(), model.parameters(), strict=True):
        # Adam turns the rounding of a gradient near 0 into a fraction of a whole step.
        assert (mine - theirs).norm() <= 0.02 * options.lr * math.sqrt(mine.numel())


@pytest.mark.parametrize("loss", ["infopo", "dpo"])
def test_accumulation_is_one_large_batch(loss: Any) -> None:
    pairs = examples(5)
    ref = torch.randn(10, dtype=torch.float64).mul(3).sub(40)
    chosen, rejected = ref.chunk(2)
    whole, parts = tiny_model(), tiny_model()
    options = TrainOptions(loss=loss, steps=1, lr=1e-2)
    one = Trainer(policy(whole), options).step([(collate(pairs, 0, CPU), ref)])
    two = Trainer(policy(parts), options).step(
        [
            (collate(pairs[:2], 0, CPU), torch.cat([chosen[:2], rejected[:2]])),
            (collate(pairs[2:], 0, CPU), torch.cat([chosen[2:], rejected[2:]])),
        ]
    )
    for key in set(one) - {"seconds", "peak_memory_mib"}:
        assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5), key
    assert one["gradient_norm"] > 0


def test_metrics_are_what_their_names_say() -> None:
    logps = torch.tensor([-10.0, -20.0, -11.0, -26.0], dtype=torch.float64)
    ref = torch.tensor([-12.0, -19.0, -10.0, -19.0], dtype=torch.float64)
    ratio = [2.0, -1.0, -1.0, -7.0]
    beta, tokens = 0.5, torch.tensor([3, 4, 5, 6])
    margins = [beta * (ratio[0] - ratio[2]), beta * (ratio[1] - ratio[3])]
    growth = [math.exp(beta * r - 1) for r in ratio[2:]]
    options = InfoPOOptions(beta=beta)
    infopo, dpo = (pair_metrics(logps, ref, tokens, loss, options) for loss in ("infopo", "dpo"))
    bound = (beta * (ratio[0] + ratio[1]) - sum(growth)) / 2
    shared = {
        "chosen_logps": -15.0,
        "rejected_logps": -18.5,
        "chosen_log_ratio": 0.5,
        "rejected_log_ratio": -4.0,
        "reward_accuracy": 1.0,
        "reward_margin": sum(margins) / 2,
        "mi_lower_bound": bound,
    }
    assert infopo == pytest.approx(shared | {"loss": -bound, "rejected_weight": beta * sum(growth) / 2})
    sigmoid = [1 / (1 + math.exp(m)) for m in margins]
    expected = {"loss": sum(-math.log(1 - s) for s in sigmoid) / 2, "rejected_weight": beta * sum(sigmoid) / 2}
    assert dpo == pytest.approx(shared | expected)
    assert pair_metrics(ref, ref, tokens, "infopo", options)["reward_accuracy"] == 0.5, "a tie counts half"


def test_scores_of_all_examples_keep_their_order() -> None:
    own, pairs = policy(tiny_model().eval()), examples(7)
    scores = all_logps(own, pairs, batch=3, average=False)
    for pair, (chosen, rejected) in zip(pairs, scores.tolist(), strict=True):
        truth = own_logps(own.model, collate([pair], 0, CPU))
        assert (chosen, rejected) == pytest.approx(tuple(truth.tolist()), rel=1e-5)
    reference = scores - torch.tensor([1.0, 2.0])
    metrics = evaluation(scores, reference, pairs, TrainOptions())
    assert (metrics["chosen_log_ratio"], metrics["rejected_log_ratio"]) == pytest.approx((1.0, 2.0))


def quiet() -> Progress:
    return Progress(Console(quiet=True))


def train(tmp_path: Path, *losses: Any, steps: int = 6, **kwargs: Any) -> History:
    trainers = [Trainer(policy(tiny_model()), TrainOptions(loss=loss, steps=steps, lr=3e-3)) for loss in losses]
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    history = run(trainers, examples(9), examples(3, seed=1), quiet(), metrics, **kwargs)
    metrics.close()
    return history


def test_a_run_of_two_losses_records_both_from_the_same_start(tmp_path: Path) -> None:
    history = train(tmp_path, "infopo", "dpo", eval_every=4)
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == history.records
    for loss in ("infopo", "dpo"):
        assert [r["step"] for r in history.select(loss, "train")] == list(range(1, 7))
        assert [r["step"] for r in history.select(loss, "held_out")] == [0, 4, 6]
    infopo, dpo = (history.select(loss, "train") for loss in ("infopo", "dpo"))
    assert infopo[0]["chosen_logps"] == dpo[0]["chosen_logps"]
    assert infopo[-1]["chosen_logps"] != dpo[-1]["chosen_logps"]
    for records in (infopo, dpo):
        assert records[0]["chosen_log_ratio"] == pytest.approx(0, abs=1e-4), "the reference is the start"
        assert all(r["seconds"] > 0 and r["peak_memory_mib"] > 0 for r in records)


def test_a_run_is_the_same_each_time_and_alone_as_beside_another(tmp_path: Path) -> None:
    def without_clock(history: History) -> list[dict[str, Any]]:
        return [
            {k: v for k, v in r.items() if k not in ("seconds", "peak_memory_mib")}
            for r in history.records
            if r["objective"] == "infopo"
        ]

    alone, again, beside = (
        without_clock(train(tmp_path / name, *losses))
        for name, losses in (("a", ["infopo"]), ("b", ["infopo"]), ("c", ["infopo", "dpo"]))
    )
    assert alone == again == beside


def test_infopo_raises_the_likelihood_of_what_it_is_shown(tmp_path: Path) -> None:
    records = train(tmp_path, "infopo", steps=30).select("infopo", "train")
    assert records[-1]["chosen_log_ratio"] > 5
    assert records[-1]["mi_lower_bound"] > records[0]["mi_lower_bound"] + 0.5


def test_time_that_is_up_ends_a_run_for_both_at_the_same_step(tmp_path: Path) -> None:
    history = train(tmp_path, "infopo", "dpo", seconds=0.0)
    assert history.out_of_time
    for loss in ("infopo", "dpo"):
        assert [r["step"] for r in history.select(loss, "train")] == [1]
        assert all(math.isfinite(r["loss"]) for r in history.select(loss, "train")), "the first step has its reference"
        assert [r["step"] for r in history.select(loss, "held_out")] == [0, 1]


def test_a_gradient_that_is_not_finite_stops_the_run() -> None:
    trainer = Trainer(policy(tiny_model()), TrainOptions(steps=1))
    batch = collate(examples(2), 0, CPU)
    with pytest.raises(UserError, match=r"step 1: the gradient's norm is .*--max-log-weight"):
        trainer.step([(batch, torch.full((4,), -1e5, dtype=torch.float64))])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_learning_rate_rises_then_falls(schedule: str) -> None:
    options = TrainOptions(steps=20, warmup=0.25, schedule=schedule)
    rates = [rate_factor(step, options) for step in range(20)]
    assert all(0 < rate <= 1 for rate in rates), "no step is wasted"
    assert rates[:5] == pytest.approx([k / 6 for k in range(1, 6)])
    assert rates[5] == 1
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[5:]))
    expected = {"linear": 1 / 15, "cosine": 0.5 + 0.5 * math.cos(math.pi * 14 / 15), "constant": 1.0}
    assert rates[-1] == pytest.approx(expected[schedule])


def test_epochs_visit_every_pair_once_and_held_out_ones_never() -> None:
    order = visiting_order(10, 25, seed=1)
    assert len(order) == 25
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20]
    kept, away = split_held_out(10, 3, seed=1)
    assert sorted(kept + away) == list(range(10))
    assert len(away) == 3
    assert (kept, away) != split_held_out(10, 3, seed=2)


def test_numbers_that_json_does_not_know_become_null(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "deep" / "metrics.jsonl")
    metrics.write({"a": math.nan, "b": math.inf, "c": 1.5, "d": "x"})
    metrics.close()
    assert json.loads((tmp_path / "deep" / "metrics.jsonl").read_text()) == {"a": None, "b": None, "c": 1.5, "d": "x"}
