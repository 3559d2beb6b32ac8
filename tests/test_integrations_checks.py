"""What is checked for the user in `PreferenceTrainer`: modes, types, first step, steps that are not finite, metrics."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from infopo_kernels import DPO, InfoPO, KernelOptions  # noqa: E402
from infopo_kernels.integrations import step  # noqa: E402
from infopo_kernels.integrations.collators import PackedPreferenceCollator, PreferenceCollator  # noqa: E402
from infopo_kernels.integrations.randomness import disable_dropout, random_parts  # noqa: E402
from infopo_kernels.integrations.trainer import PreferenceTrainer, compute_infopo_loss  # noqa: E402
from infopo_kernels.integrations.transformers import attach_linear_logps  # noqa: E402
from tests.training_fixtures import tiny_model  # noqa: E402

Feature = dict[str, Any]


def features(count: int = 8, seed: int = 0, **more: Any) -> list[Feature]:
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, 250, (size,), generator=generator).tolist()

    return [
        {"prompt_ids": ids(2, 9), "chosen_ids": ids(3, 12), "rejected_ids": ids(3, 12), **more} for _ in range(count)
    ]


def arguments(output: Path, **overrides: Any) -> Any:
    settings = {
        "output_dir": str(output), "max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "logging_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    return transformers.TrainingArguments(**{**settings, **overrides})


def trainer(
    output: Path, model: Any = None, *, made: Any = None, args: Any = None, **options: Any
) -> PreferenceTrainer:
    model = tiny_model() if model is None else model
    options.setdefault("data_collator", PreferenceCollator())
    return PreferenceTrainer(
        model, arguments(output, **(args or {})), train_dataset=features() if made is None else made, **options
    )


def lora(model: Any, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", **options)
    )


def first_log(run: PreferenceTrainer) -> dict[str, float]:
    run.train()
    return next(entry for entry in run.state.log_history if "loss" in entry)


@pytest.mark.parametrize(
    ("sizes", "wrong", "message"),
    [
        ({}, 300, "pair 1, field `rejected`: holds the token id 300, and the model has embeddings for ids below 259"),
        ({}, -100, "pair 1, field `rejected`: holds the token id -100; ids are from 0 up"),
        ({"architecture": "gpt2", "n_positions": 8}, 5, "pair 0, .* learned positions for 8"),
    ],
)
@pytest.mark.parametrize("table", [False, True])
def test_what_the_model_cannot_take_is_refused_at_construction(
    tmp_path: Path, sizes: dict[str, Any], wrong: int, message: str, table: bool
) -> None:
    features = [{"prompt_ids": [3] * 5, "chosen_ids": [4] * 5, "rejected_ids": [6, each]} for each in (7, wrong)]
    data = pytest.importorskip("datasets").Dataset.from_list(features) if table else features
    with pytest.raises(ValueError, match=message):
        PreferenceTrainer(
            tiny_model(**sizes), transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
            train_dataset=data, data_collator=PreferenceCollator(), reference_free=True,
        )  # fmt: skip


# --- modes (dropout, noise) and types ---------------------------------------------------------------------------------

RANDOM = {
    "gpt2": lambda: tiny_model("gpt2"),  # dropout modules, 0.1 each
    "attention": lambda: tiny_model(attention_dropout=0.3, attn_implementation="eager"),  # a number of the layer
    "lora": lambda: lora(tiny_model(), lora_dropout=0.5),
    "layerdrop": lambda: tiny_model("opt", layerdrop=0.9, ffn_dim=32, word_embed_proj_dim=32),
    "persimmon": lambda: tiny_model("persimmon", attention_dropout=0.5, attn_implementation="eager"),  # configuration
    "jitter": lambda: tiny_model("mixtral", num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.5),
}


@pytest.mark.parametrize("kind", RANDOM)
def test_policy_and_reference_run_in_one_mode(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = RANDOM[kind]()
    reference = None if kind == "lora" else RANDOM[kind]()
    with caplog.at_level(logging.WARNING):
        logged = first_log(trainer(tmp_path, model, ref_model=reference, strict_checks=True))
    assert logged["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert logged["mi_lower_bound"] == pytest.approx(-0.367879, abs=1e-5)
    assert "was switched off" in caplog.text
    assert not random_parts(model)


@pytest.mark.parametrize("kind", ["gpt2", "attention", "lora"])
def test_the_first_step_notices_what_is_random(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    def made(strict: bool) -> PreferenceTrainer:
        reference = None if kind == "lora" else RANDOM[kind]()
        return trainer(tmp_path, RANDOM[kind](), ref_model=reference, disable_dropout=False, strict_checks=strict)

    if kind == "lora":  # a fresh adapter adds nothing, with dropout or without
        first_log(made(True))
        return
    with pytest.raises(RuntimeError, match=r"every reward 0.*dropout"):
        made(True).train()
    with caplog.at_level(logging.WARNING):
        first_log(made(False))
    assert caplog.text.count("At the first step the policy must be the reference") == 1


def test_noise_on_embeddings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neftune_noise_alpha"):
        trainer(tmp_path, ref_model=tiny_model(), args={"neftune_noise_alpha": 5.0})
    from transformers.integrations.neftune import neftune_post_forward_hook

    model = tiny_model()
    model.get_input_embeddings().neftune_noise_alpha = 5.0
    model.get_input_embeddings().register_forward_hook(neftune_post_forward_hook)
    with pytest.raises(ValueError, match="NEFTune's hook"):
        disable_dropout(model)


@pytest.mark.parametrize("method", ["LoHaConfig", "LoKrConfig"])
@pytest.mark.parametrize("kind", ["rank_dropout", "module_dropout"])
def test_probabilities_that_an_adapter_keeps_by_name(method: str, kind: str) -> None:
    peft = pytest.importorskip("peft")
    config = getattr(peft, method)(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **{kind: 0.5})
    model = peft.get_peft_model(tiny_model(), config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * parameter.requires_grad)
    ids = torch.arange(9)[None] + 3

    def answers() -> torch.Tensor:
        return torch.stack([model(ids).logits for _ in range(8)])

    assert answers().var(0).max() > 1e-3
    assert disable_dropout(model) == [f"q_proj.{kind} = 0.5 (2 times)"]
    assert answers().var(0).max() < 1e-9


def test_numbers_that_are_no_probabilities_stay() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop_last, self.raindrops, self.attention_dropout, self.dropped = True, 3, 0.25, "no"
            self.inner = nn.AlphaDropout(0.5)

    layer = Layer()
    assert disable_dropout(layer) == ["Layer.attention_dropout = 0.25", "inner.p = 0.5"]
    assert layer.raindrops == 3


@pytest.mark.parametrize("strict", [False, True])
def test_a_reference_of_another_type_is_said(tmp_path: Path, strict: bool, caplog: pytest.LogCaptureFixture) -> None:
    make = lambda: trainer(  # noqa: E731
        tmp_path, tiny_model().to(torch.bfloat16), ref_model=tiny_model(), strict_checks=strict
    )
    if strict:
        with pytest.raises(RuntimeError, match=r"policy's weights are torch.bfloat16, the reference's torch.float32"):
            make()
        return
    with caplog.at_level(logging.WARNING):
        make()
    assert "Load both with the same `dtype`" in caplog.text


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_first_step_passes(tmp_path: Path, dtype: torch.dtype, layout: str) -> None:
    collator = PreferenceCollator() if layout == "padded" else PackedPreferenceCollator()
    model, reference = (tiny_model().to(dtype) for _ in range(2))
    first_log(trainer(tmp_path, model, ref_model=reference, data_collator=collator, strict_checks=True))
    # References that were computed pair by pair round otherwise.
    reference = attach_linear_logps(tiny_model().to(dtype))
    made = features()
    for feature in made:
        with torch.no_grad():
            chosen, rejected = reference(**PreferenceCollator()([feature]), linear_logps="sum").logps.tolist()
        feature |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    first_log(trainer(tmp_path, tiny_model().to(dtype), made=made, data_collator=collator, strict_checks=True))


@pytest.mark.parametrize("kind", ["the model", "its base", "compiled"])
def test_a_reference_that_would_be_trained_along_is_refused(tmp_path: Path, kind: str) -> None:
    model = lora(tiny_model()) if kind == "its base" else tiny_model()
    reference = {
        "the model": lambda: model,
        "its base": lambda: model.get_base_model(),
        "compiled": lambda: torch.compile(model),
    }
    with pytest.raises(ValueError, match="`ref_model` shares weights that are trained"):
        trainer(tmp_path, model, ref_model=reference[kind]())


def test_another_reference_is_compared_with_nothing_and_a_stale_one_is_noticed(tmp_path: Path) -> None:
    first_log(trainer(tmp_path, ref_model=tiny_model(seed=1), strict_checks=True))
    stale = features(ref_chosen_logps=-20.0, ref_rejected_logps=-20.0)
    with pytest.raises(RuntimeError, match="computed ahead of time"):
        trainer(tmp_path, made=stale, strict_checks=True).train()
    trained = lora(tiny_model(), init_lora_weights=False)  # the base is not what training starts from
    with pytest.raises(RuntimeError, match="an adapter that is not fresh"):
        trainer(tmp_path, trained, strict_checks=True).train()


@pytest.mark.parametrize("adapter", [False, True])
def test_a_resumed_run_knows_its_reference(tmp_path: Path, adapter: bool) -> None:
    def made(seed: int, steps: int) -> PreferenceTrainer:
        model = lora(tiny_model(seed=seed)) if adapter else tiny_model()
        return trainer(
            tmp_path, model, ref_model=None if adapter else tiny_model(seed=seed), strict_checks=True,
            args={"max_steps": steps, "save_strategy": "steps", "save_steps": 1},
        )  # fmt: skip

    made(0, 1).train()
    checkpoint = tmp_path / "checkpoint-1"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert len(state["stateful_callbacks"]["ReferenceMemory"]["attributes"]["logps"]) == 2
    made(0, 2).train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(RuntimeError, match="not the one that this run began with"):
        made(1, 2).train(resume_from_checkpoint=str(checkpoint))


# --- steps that are not finite ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_loss_that_is_not_finite_stops_before_a_weight_is_changed(
    tmp_path: Path, accumulate: int, bf16: bool
) -> None:
    model = tiny_model()
    made = features(4, ref_chosen_logps=-30.0, ref_rejected_logps=-30.0)
    made[2]["ref_rejected_logps"] = -1900.0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = trainer(
        tmp_path,
        model,
        made=made,
        args={"gradient_accumulation_steps": accumulate, "per_device_train_batch_size": 4 // accumulate, "bf16": bf16},
    )
    with pytest.raises(
        FloatingPointError, match=r"Step 1: the loss is inf\. Rejected response .*\+1\d\d\d.*max_log_weight"
    ):
        run.train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    capped = trainer(tmp_path, tiny_model(), made=made, infopo=InfoPO(max_log_weight=2.0))
    assert first_log(capped)["rejected_weight/capped"] > 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_pooled_tail_is_reported(tmp_path: Path, accumulate: int) -> None:
    """Of training: an evaluation forms no gradient, so it pools nothing."""
    args = {"gradient_accumulation_steps": accumulate, "per_device_train_batch_size": 4 // accumulate}
    kernel = KernelOptions(tail_threshold=0.05)
    run = trainer(tmp_path, args=args, kernel=kernel, eval_dataset=features(4, seed=1), reference_free=True)
    entry = first_log(run)
    assert 0 < entry["tail/mass_mean"] < entry["tail/mass_max"] < 1
    assert 0 < entry["tail/kept_share"] < 1
    assert not [name for name in run.evaluate() if "tail/" in name]
    exact = first_log(trainer(tmp_path, args=args, reference_free=True))
    assert not [name for name in exact if "tail/" in name]
    assert exact["loss"] == pytest.approx(entry["loss"], rel=1e-5)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_stops_too(tmp_path: Path, clip: float) -> None:
    model = tiny_model()
    model.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = model.lm_head.weight.detach().clone()
    run = trainer(tmp_path, model, ref_model=tiny_model(), args={"max_grad_norm": clip})
    with pytest.raises(FloatingPointError, match=r"gradient's norm is (inf|nan) although the loss is finite"):
        run.train()
    assert torch.equal(model.lm_head.weight, before)


def test_compute_loss_stops_too() -> None:
    model = attach_linear_logps(tiny_model())
    inputs = PreferenceCollator()(features(2, ref_chosen_logps=float("nan"), ref_rejected_logps=-9000.0))
    with pytest.raises(FloatingPointError, match="Rejected response"):
        compute_infopo_loss(model, inputs, skip_chosen_reference=True)
    with torch.no_grad():
        assert compute_infopo_loss(model, inputs, skip_chosen_reference=True).loss.isinf()


# --- no reference is asked for ----------------------------------------------------------------------------------------


def test_no_reference_is_never_silently_reference_free(tmp_path: Path) -> None:
    model = attach_linear_logps(tiny_model())
    inputs = PreferenceCollator()(features(2))
    with pytest.raises(ValueError, match=r"There is no reference.*reference_free=True"):
        compute_infopo_loss(model, inputs)
    out = compute_infopo_loss(model, inputs, reference_free=True)
    torch.testing.assert_close(out.infopo.rewards, 0.1 * out.infopo.logps)
    with pytest.raises(ValueError, match="leave one of them out"):
        compute_infopo_loss(model, inputs, ref_model=model, reference_free=True)
    with pytest.raises(ValueError, match="There is no reference"):
        trainer(tmp_path).train()
    assert first_log(trainer(tmp_path, reference_free=True, infopo=InfoPO(average=True)))["rewards/chosen"] < 0


@pytest.mark.parametrize("remove_unused_columns", [True, False])
@pytest.mark.parametrize("what", ["train", "evaluate", "evaluate by name", "predict"])
@pytest.mark.parametrize("table", [True, False])
def test_rows_of_text_are_refused_by_name(what: str, table: bool, remove_unused_columns: bool, tmp_path: Path) -> None:
    rows: Any = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4
    if table:
        rows = pytest.importorskip("datasets").Dataset.from_list(rows)
    run = trainer(
        tmp_path, made=rows if what == "train" else None, reference_free=True, eval_dataset={"held_out": rows},
        args={"remove_unused_columns": remove_unused_columns},
    )  # fmt: skip
    name = "train" if what == "train" else "test" if what == "predict" else "eval"
    call, given = what.partition(" ")[0], [] if what in ("train", "evaluate by name") else [rows]
    with pytest.raises(ValueError, match=rf"`{name}_dataset` must hold features.*\(prompt, chosen, rejected\).*make"):
        getattr(run, call)(*given)


def test_without_a_collator_pairs_are_padded(tmp_path: Path) -> None:
    options = {"reference_free": True, "infopo": InfoPO(average=True)}
    given = first_log(trainer(tmp_path, **options))
    run = PreferenceTrainer(tiny_model(), arguments(tmp_path), train_dataset=features(), **options)
    assert first_log(run)["loss"] == given["loss"]


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_stand_under_the_prefix_of_their_own_evaluation(tmp_path: Path) -> None:
    easy, hard = features(6, 1), features(5, 2)
    run = trainer(
        tmp_path, ref_model=tiny_model(seed=1), eval_dataset={"easy": easy, "hard": hard},
        args={"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "logging_steps": 2},
    )  # fmt: skip
    own = {name: trainer(tmp_path, ref_model=tiny_model(seed=1)).evaluate(made) for name, made in
           (("easy", easy), ("hard", hard))}  # fmt: skip
    both = run.evaluate()
    test = run.evaluate(hard, metric_key_prefix="test")
    predicted = run.predict(hard, metric_key_prefix="held_out").metrics
    for name in ("rewards/margins", "mi_lower_bound", "loss", "scored_tokens"):
        assert both[f"eval_easy_{name}"] == pytest.approx(own["easy"][f"eval_{name}"])
        assert both[f"eval_hard_{name}"] == pytest.approx(own["hard"][f"eval_{name}"])
        assert test[f"test_{name}"] == predicted[f"held_out_{name}"] == both[f"eval_hard_{name}"]
    assert not any(key.startswith("eval_rewards") for key in {**both, **test})
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logs) == 1
    assert logs[0]["scored_tokens"] > 0  # of both steps, although an evaluation lay between them


@pytest.mark.parametrize("objective", [InfoPO(beta=0.5), DPO(0.5)])
def test_evaluation_is_the_mean_over_pairs(tmp_path: Path, objective: Any) -> None:
    made = features(5, 3)
    run = trainer(tmp_path, objective=objective, ref_model=tiny_model(seed=1), args={"per_device_eval_batch_size": 4})
    found = run.evaluate(made)  # batches of 4 and 1
    with torch.no_grad():
        inputs = PreferenceCollator()(made)
        whole = compute_infopo_loss(run.model, inputs, objective, ref_model=run.ref_model)
    assert found["eval_loss"] == pytest.approx(float(whole.loss), rel=1e-5)
    rewards = whole.infopo.rewards
    assert found["eval_rewards/accuracies"] == pytest.approx(float((rewards[:5] > rewards[5:]).double().mean()))


# --- several rejected responses, weights, masks -----------------------------------------------------------------------


def unequal() -> list[Feature]:
    made = features(3, 4)
    others = features(6, 5)
    K = [1, 3, 2]
    for index, feature in enumerate(made):
        feature["rejected_ids"] = [others.pop()["rejected_ids"] for _ in range(K[index])]
        feature["weight"] = [0.5, 2.0, 1.5][index]
        feature["chosen_mask"] = [1] * (len(feature["chosen_ids"]) - 1) + [0]
        feature["rejected_mask"] = [[0] + [1] * (len(ids) - 1) for ids in feature["rejected_ids"]]
    return made


def plain_loss(model: Any, reference: Any, made: list[Feature], beta: float) -> tuple[torch.Tensor, dict[str, float]]:
    """From logits, in float64, prompt by prompt."""

    def logps(module: Any, prompt: list[int], response: list[int], mask: list[int]) -> torch.Tensor:
        ids = torch.tensor([prompt + response])
        tokens = module(ids).logits[0, :-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
        return (tokens[len(prompt) - 1 :] * torch.tensor(mask)).sum()

    loss, margins = torch.zeros((), dtype=torch.float64), []
    for feature in made:
        prompt, K = feature["prompt_ids"], len(feature["rejected_ids"])
        rewards = []
        for ids, mask in zip(
            [feature["chosen_ids"], *feature["rejected_ids"]], [feature["chosen_mask"], *feature["rejected_mask"]],
            strict=True,
        ):  # fmt: skip
            with torch.no_grad():
                ref = logps(reference, prompt, ids, mask)
            rewards.append(beta * (logps(model, prompt, ids, mask) - ref))
        terms = -rewards[0] + sum(torch.exp(reward - 1) for reward in rewards[1:]) / K
        loss = loss + feature["weight"] * terms / len(made)
        margins += [float(rewards[0] - reward) for reward in rewards[1:]]
    return loss, {"margins": sum(margins) / len(margins), "accuracies": sum(m > 0 for m in margins) / len(margins)}


@pytest.mark.parametrize("layout", ["padded", "packed", "shared-prompt"])
def test_several_rejected_responses_weights_and_masks_in_the_trainer(tmp_path: Path, layout: str) -> None:
    collators = {"padded": PreferenceCollator(), "packed": PackedPreferenceCollator()}
    collator = collators.get(layout) or PackedPreferenceCollator(share_prompt=True)
    sdpa = {"attn_implementation": "sdpa"}
    model, reference = tiny_model(**sdpa), tiny_model(seed=1, **sdpa)
    plain = tiny_model(**sdpa)
    run = trainer(
        tmp_path, model, made=unequal(), ref_model=reference, data_collator=collator, infopo=InfoPO(beta=0.2),
        args={"per_device_train_batch_size": 3, "max_grad_norm": 0.0, "optim": "sgd", "lr_scheduler_type": "constant"},
    )  # fmt: skip
    logged = first_log(run)
    loss, metrics = plain_loss(plain, tiny_model(seed=1, **sdpa), unequal(), 0.2)
    loss.backward()
    assert logged["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert logged["mi_lower_bound"] == pytest.approx(-float(loss), rel=1e-5)
    assert logged["rewards/margins"] == pytest.approx(metrics["margins"], rel=1e-4)
    assert logged["rewards/accuracies"] == pytest.approx(metrics["accuracies"])
    for (name, after), before in zip(model.named_parameters(), plain.parameters(), strict=True):
        moved = (before - after).detach() / 1e-2
        assert float((moved - before.grad).norm()) <= 2e-3 * float(before.grad.norm()) + 1e-4, name


def test_pairs_that_fill_a_batch_count_once() -> None:
    made = unequal()
    for collator in (PreferenceCollator(), PackedPreferenceCollator()):
        model, reference = attach_linear_logps(tiny_model()), attach_linear_logps(tiny_model(seed=1))
        filled = step.counted_once(collator([*made, *made[:2]]), unique=3, pairs=3.0)
        whole = collator(made)
        outputs = [compute_infopo_loss(model, batch, ref_model=reference) for batch in (filled, whole)]
        torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-5, atol=1e-5)
        sums = [
            step.metric_sums(out.infopo, InfoPO(), *step.split_inputs(batch))
            for out, batch in zip(outputs, (filled, whole), strict=True)
        ]
        torch.testing.assert_close(sums[0], sums[1], rtol=1e-5, atol=1e-4)


# --- the rejected half ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [{"pixel_values": torch.zeros(6, 3)}, {"image_grid_thw": torch.ones(6, 3).long()}])
def test_what_is_not_counted_by_sequences_is_not_cut(extra: dict[str, torch.Tensor]) -> None:
    inputs = step.split_inputs(PreferenceCollator()(features(3)))[0]
    assert step.can_be_cut(inputs)
    assert not step.can_be_cut({**inputs, **extra})


def test_positions_of_several_kinds_are_cut_by_sequence() -> None:
    inputs = step.split_inputs(PreferenceCollator()(features(3)))[0]
    S, T = inputs["input_ids"].shape
    inputs |= {"position_ids": torch.arange(3 * S * T).reshape(3, S, T), "token_type_ids": inputs["attention_mask"]}
    half = step.rejected_half(inputs, 3)
    assert torch.equal(half["position_ids"], inputs["position_ids"][:, 3:])
    assert torch.equal(half["token_type_ids"], inputs["token_type_ids"][3:])
    one = step.rejected_half({**inputs, "position_ids": torch.arange(T)[None]}, 3)
    assert one["position_ids"].shape == (1, T)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_rejected_half_of_unequal_batches(layout: str) -> None:
    collator = PreferenceCollator() if layout == "padded" else PackedPreferenceCollator()
    model = attach_linear_logps(tiny_model()).train()
    inputs, known = step.split_inputs(collator(unequal()))
    whole = step.reference_logps(model, inputs, average=False)
    half = step.reference_logps(model, inputs, average=False, skip_chosen=True, num_chosen=3)
    assert half[:3].isnan().all()
    torch.testing.assert_close(half[3:], whole[3:], rtol=1e-6, atol=1e-5)
    assert (counts := step.num_rejected(inputs, known)) == [1, 3, 2]
    assert step.rejected_prompts(counts, torch.device("cpu")).tolist() == [0, 1, 1, 1, 2, 2]
    # Batches of other hands have the weights alone, and packs the bounds.
    assert step.num_rejected(inputs, {key: value for key, value in known.items() if key != "num_rejected"}) == counts
    bare = {key: value for key, value in inputs.items() if key != "rejected_start"}
    torch.testing.assert_close(step.rejected_half(bare, 3), step.rejected_half(inputs, 3))
    assert model.training
