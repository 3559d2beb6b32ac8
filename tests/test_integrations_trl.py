"""InfoPOTrainer against a trainer on plain logits; its options, references, packs and metrics."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("trl")
pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

from datasets import Dataset  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402

from infopo_kernels.commands import cli  # noqa: E402
from infopo_kernels.commands.demo.word_problems import word_problems  # noqa: E402
from infopo_kernels.integrations.preferences import feature_dataset  # noqa: E402
from infopo_kernels.integrations.randomness import random_parts  # noqa: E402
from infopo_kernels.integrations.trl import InfoPOConfig, InfoPOTrainer  # noqa: E402
from tests.test_integrations_checks import plain_loss, unequal  # noqa: E402
from tests.training_fixtures import byte_tokenizer, save_tiny_model, tiny_model, write_pairs  # noqa: E402

STEPS = 5
MAX_LENGTH = 256


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk, from which policy and reference start."""
    return save_tiny_model(tmp_path_factory.mktemp("model"), initializer_range=0.1)


def dataset(count: int = 12, seed: int = 0) -> Dataset:
    return Dataset.from_list([pair.row() for pair in word_problems(count, seed)])


def config(output: Path, kind: type = InfoPOConfig, **overrides: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(output), "max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "logging_steps": 1, "report_to": [], "bf16": False, "use_cpu": True, "save_strategy": "no",
        "max_length": MAX_LENGTH, "beta": 0.1, "disable_tqdm": True, "model_init_kwargs": {"dtype": "float32"},
        "gradient_checkpointing": False, **({"strict_checks": True} if kind is InfoPOConfig else {}),
    }  # fmt: skip
    return kind(**{**settings, **overrides})


class PlainTrainer(DPOTrainer):  # type: ignore[misc]
    """InfoPO from the model's own logits, in float64, by the equations of the paper."""

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        def logps(module: Any) -> torch.Tensor:
            logits = module(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
            token = logits.double().log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1)
            return (token * inputs["completion_mask"][:, 1:]).sum(-1)

        with torch.no_grad():
            if self.ref_model is None:
                with self.model.disable_adapter():
                    reference = logps(self.model)
            else:
                reference = logps(self.ref_model)
        chosen, rejected = (self.beta * (logps(model) - reference)).chunk(2)
        return (-chosen + torch.exp(rejected - 1)).mean()


def train(trainer: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of the steps, and how far each trained parameter went."""
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach() - before[name] for name, p in trained.items()}


def lora() -> Any:
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.0)


def assert_same_run(ours: Any, truth: Any, tolerance: float = 2e-3) -> None:
    """Adam divides by the size of the gradient, so that entries of it that are mere rounding become whole steps: hence
    the norm over each parameter, not the largest entry."""
    assert len(ours[0]) == len(truth[0]) == STEPS
    assert ours[0] == pytest.approx(truth[0], rel=1e-4, abs=2e-4)
    moved = 0.0
    for name, expected in truth[1].items():
        moved += float(expected.norm())
        assert float((ours[1][name] - expected).norm()) <= tolerance * float(expected.norm()) + 1e-6, name
    assert moved > 0.1


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("layout", ["padded", "packed", "shared-prompt"])
def test_five_steps_are_those_of_plain_logits(start: Path, tmp_path: Path, adapter: bool, layout: str) -> None:
    options = {"gradient_accumulation_steps": 2, "sync_ref_model": not adapter, "ref_model_sync_steps": 2}
    given = {"train_dataset": dataset(), "processing_class": byte_tokenizer()}
    extra = {"padded": {}, "packed": {"padding_free": True}}
    ours = config(tmp_path, **options, **extra.get(layout, {"padding_free": True, "share_prompt": True}))
    fused = InfoPOTrainer(str(start), args=ours, peft_config=lora() if adapter else None, **given)
    run = train(fused)
    plain_args = config(tmp_path, DPOConfig, **options)
    plain = PlainTrainer(str(start), args=plain_args, peft_config=lora() if adapter else None, **given)
    assert_same_run(run, train(plain))

    entry = fused.state.log_history[0]
    for name in ("rewards/chosen", "rewards/accuracies", "logps/rejected", "mi_lower_bound", "rejected_weight/mean"):
        assert name in entry
    # Before the first step policy and reference agree: the bound is 0 - e^-1, the weight beta e^-1.
    assert entry["mi_lower_bound"] == pytest.approx(-0.36788, abs=1e-3)
    assert entry["rejected_weight/mean"] == pytest.approx(0.036788, abs=1e-4)
    assert entry["rejected_weight/underflowed"] == 0
    assert entry["rejected_weight/capped"] == 0


def test_bfloat16_checkpointing_and_evaluation(start: Path, tmp_path: Path) -> None:
    args = config(
        tmp_path, bf16=True, gradient_checkpointing=True, max_steps=2, eval_strategy="steps", eval_steps=1,
        per_device_eval_batch_size=3, max_log_weight=-2.0,
    )  # fmt: skip
    trainer = InfoPOTrainer(
        str(start), args=args, train_dataset=dataset(), eval_dataset=dataset(4, 1), processing_class=byte_tokenizer()
    )
    trainer.train()
    evaluation = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluation) == 2
    assert {"eval_rewards/margins", "eval_mi_lower_bound", "eval_rejected_weight/capped"} <= evaluation[0].keys()
    assert trainer.state.log_history[0]["rejected_weight/capped"] == 1  # e^-1 lies above e^-2


def test_a_pooled_tail_is_reported(start: Path, tmp_path: Path) -> None:
    args = config(tmp_path, max_steps=2, tail_threshold=0.02)  # 259 words, nearly alike: 1 / 259 each
    trainer = InfoPOTrainer(str(start), args=args, train_dataset=dataset(), processing_class=byte_tokenizer())
    trainer.train()
    for entry in trainer.state.log_history[:2]:
        assert 0 < entry["tail/mass_mean"] < entry["tail/mass_max"] <= 1
        assert 0 < entry["tail/kept_share"] < 1


@pytest.mark.parametrize("average", [False, True], ids=["sum", "mean"])
def test_references_ahead_of_time_change_nothing(start: Path, tmp_path: Path, average: bool) -> None:
    given = {"train_dataset": dataset(), "processing_class": byte_tokenizer()}
    beta = 2.0 if average else 0.1
    shared = {"average": average, "beta": beta}
    truth = train(InfoPOTrainer(str(start), args=config(tmp_path, **shared), **given))
    ahead = InfoPOTrainer(str(start), args=config(tmp_path, precompute_ref_log_probs=True, **shared), **given)
    assert ahead.ref_model is None
    assert_same_run(train(ahead), truth)

    data, output = write_pairs(tmp_path / "pairs.jsonl", 12), tmp_path / "reference.jsonl"
    command = ["--model", str(start), "--data", str(data), "--output", str(output), "--max-length", str(MAX_LENGTH)]
    assert cli.main(["precompute-reference", *command, *(["--average"] if average else [])]) == 0
    from_file = InfoPOTrainer(str(start), args=config(tmp_path, reference_logps=str(output), **shared), **given)
    assert from_file.ref_model is None
    assert_same_run(train(from_file), truth)

    other = save_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="another model"):
        InfoPOTrainer(str(other), args=config(tmp_path, reference_logps=str(output), **shared), **given)
    stranger = {**given, "train_dataset": dataset(12, 5)}
    with pytest.raises(ValueError, match="not in it"):
        InfoPOTrainer(str(start), args=config(tmp_path, reference_logps=str(output), **shared), **stranger)
    with pytest.raises(ValueError, match="max_length"):
        InfoPOTrainer(
            str(start), args=config(tmp_path, reference_logps=str(output), **{**shared, "max_length": 99}), **given
        )


@pytest.mark.parametrize("cached", [False, True], ids=["in memory", "on disk"])
def test_references_ahead_of_time_of_several_rejected_responses(start: Path, tmp_path: Path, cached: bool) -> None:
    """One prompt with a single rejected response, in a list, beside prompts with two and three."""
    rows = [
        {"prompt": f"q{i}", "chosen": " yes" * (i + 1), "rejected": [" no" * (k + 1) for k in range(count)]}
        for i, count in enumerate((2, 1, 3, 2))
    ]
    data = Dataset.from_list(rows)
    if cached:
        data.save_to_disk(tmp_path / "rows")
        data = Dataset.load_from_disk(tmp_path / "rows")
    given = {"train_dataset": data, "processing_class": byte_tokenizer()}
    truth = train(InfoPOTrainer(str(start), args=config(tmp_path), **given))
    ahead = InfoPOTrainer(str(start), args=config(tmp_path, precompute_ref_log_probs=True), **given)
    assert bool(data.cache_files) == cached
    assert ahead.ref_model is None
    assert_same_run(train(ahead), truth)


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_without_chosen_references_serves_who_skips_them(start: Path, tmp_path: Path, packed: bool) -> None:
    given = {"train_dataset": dataset(), "processing_class": byte_tokenizer()}
    data, output = write_pairs(tmp_path / "pairs.jsonl", 12), tmp_path / "reference.jsonl"
    command = ["--model", str(start), "--data", str(data), "--output", str(output), "--max-length", str(MAX_LENGTH)]
    assert cli.main(["precompute-reference", *command, "--skip-chosen-reference"]) == 0
    options = {"reference_logps": str(output), "padding_free": packed, "max_steps": 2}
    with pytest.raises(ValueError, match="holds no chosen references"):
        InfoPOTrainer(str(start), args=config(tmp_path, **options), **given)
    half = InfoPOTrainer(str(start), args=config(tmp_path, skip_chosen_reference=True, **options), **given)
    whole = InfoPOTrainer(str(start), args=config(tmp_path, max_steps=2, padding_free=packed), **given)
    ours, truth = train(half)[1], train(whole)[1]
    for name, expected in truth.items():
        assert float((ours[name] - expected).norm()) <= 2e-3 * float(expected.norm()) + 1e-6, name
    assert "mi_lower_bound" not in half.state.log_history[0]


@pytest.mark.parametrize("options", [{}, {"padding_free": True}, {"precompute_ref_log_probs": True}])
def test_skipping_the_chosen_reference_leaves_the_gradient_alone(
    start: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    given = {"train_dataset": dataset(), "processing_class": byte_tokenizer()}
    truth = train(InfoPOTrainer(str(start), args=config(tmp_path), **given))
    skipping = InfoPOTrainer(str(start), args=config(tmp_path, skip_chosen_reference=True, **options), **given)
    moved = train(skipping)[1]
    for name, expected in truth[1].items():
        assert float((moved[name] - expected).norm()) <= 2e-3 * float(expected.norm()) + 1e-6, name
    logged = skipping.state.log_history[0]
    assert "mi_lower_bound" not in logged
    assert "rewards/accuracies" not in logged
    assert "rewards/rejected" in logged


def test_reference_free(start: Path, tmp_path: Path) -> None:
    args = config(tmp_path, reference_free=True, max_steps=1, average=True, beta=1.0)
    trainer = InfoPOTrainer(str(start), args=args, train_dataset=dataset(), processing_class=byte_tokenizer())
    assert trainer.ref_model is None
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["rewards/chosen"] == pytest.approx(logged["logps/chosen"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "hinge"}, r"`loss_type` must be one of infopo, sigmoid.*linear_logps"),
        ({"loss_type": ["sigmoid", "sft"]}, r"`loss_type` must be one of infopo, sigmoid.*linear_logps"),
        ({"loss_type": "sigmoid", "max_log_weight": 1.0}, "belongs to InfoPO"),
        ({"neftune_noise_alpha": 5.0}, "adds noise to the policy's embeddings"),
        ({"score_turns": "user"}, "score_turns"),
        ({"reference_logps": "file", "sync_ref_model": True}, "sync_ref_model"),
        ({"loss_weights": [0.5]}, "`loss_weights"),
        ({"label_smoothing": 0.1}, "max_log_weight"),
        ({"f_divergence_type": "js_divergence"}, "KL divergence"),
        ({"f_alpha_divergence_coef": 0.2}, "KL divergence"),
        ({"ld_alpha": 0.5}, "average=True"),
        ({"use_weighting": True}, "WPO"),
        ({"discopop_tau": 0.1}, "DiscoPOP"),
        ({"beta": 0.0}, "`beta`"),
        ({"backend": "cuda"}, "`backend`"),
        ({"share_prompt": True}, "padding_free"),
        ({"truncation_mode": "keep_end"}, "keep_start"),
        ({"reference_free": True, "skip_chosen_reference": True}, "contradicts"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_options_without_meaning_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_wrong_use_is_refused(start: Path, tmp_path: Path) -> None:
    given = {"train_dataset": dataset(4), "processing_class": byte_tokenizer()}
    with pytest.raises(TypeError, match="InfoPOConfig"):
        InfoPOTrainer(str(start), args=config(tmp_path, DPOConfig), **given)
    on_head = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"])
    with pytest.raises((TypeError, ValueError), match="lm_head"):
        InfoPOTrainer(str(start), args=config(tmp_path), peft_config=on_head, **given)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_other_losses_are_those_of_trl(start: Path, tmp_path: Path, loss_type: str) -> None:
    given = {"train_dataset": dataset(), "processing_class": byte_tokenizer()}
    fused = InfoPOTrainer(str(start), args=config(tmp_path, loss_type=loss_type), **given)
    run = train(fused)
    plain = DPOTrainer(str(start), args=config(tmp_path, DPOConfig, loss_type=loss_type), **given)
    assert_same_run(run, train(plain), 5e-3)
    ours, theirs = fused.state.log_history[2], plain.state.log_history[2]
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        scale = float(torch.tensor(theirs[name]).abs())
        if loss_type == "sigmoid" or name.startswith("logps"):  # IPO's rewards are of means here, of sums in TRL
            assert loss_type == "ipo" or ours[name] == pytest.approx(theirs[name], abs=2e-3 + 1e-3 * scale), name
    assert ours["num_tokens"] == theirs["num_tokens"]


@pytest.mark.parametrize("loss_type", ["simpo", "sft"])
def test_losses_without_a_reference_load_none(start: Path, tmp_path: Path, loss_type: str) -> None:
    args = config(tmp_path, loss_type=loss_type, beta=2.0, max_steps=1)
    trainer = InfoPOTrainer(str(start), args=args, train_dataset=dataset(), processing_class=byte_tokenizer())
    assert trainer.ref_model is None
    trainer.train()
    logged = trainer.state.log_history[0]
    expected = {"simpo": 2.0 * logged["logps/chosen"], "sft": logged["logps/chosen"]}
    assert logged["rewards/chosen"] == pytest.approx(expected[loss_type])


@pytest.mark.parametrize("streamed", [False, True])
def test_nothing_is_refused_that_needs_no_model(start: Path, tmp_path: Path, streamed: bool) -> None:
    """Streams, and new data after training, without a reference and with one from a file."""
    data, output = write_pairs(tmp_path / "pairs.jsonl", 12), tmp_path / "reference.jsonl"
    command = ["precompute-reference", "--model", str(start), "--data", str(data), "--output", str(output)]
    assert cli.main([*command, "--max-length", str(MAX_LENGTH)]) == 0
    made = dataset().to_iterable_dataset() if streamed else dataset()
    given = {"train_dataset": made, "processing_class": byte_tokenizer()}

    args = config(tmp_path, reference_free=True, max_steps=2, average=True)
    free = InfoPOTrainer(str(start), args=args, **given)
    free.train()
    assert free.evaluate(dataset(4, 9))["eval_rewards/chosen"] < 0

    truth = train(
        InfoPOTrainer(str(start), args=config(tmp_path, max_steps=2), **{**given, "train_dataset": dataset()})
    )
    held = InfoPOTrainer(str(start), args=config(tmp_path, reference_logps=str(output), max_steps=2), **given)
    assert held.ref_model is None
    assert not held.args.precompute_ref_log_probs
    run = train(held)
    if not streamed:  # a stream is read in order
        assert run[0] == pytest.approx(truth[0], rel=1e-4, abs=2e-4)
    assert "eval_mi_lower_bound" in held.evaluate(dataset().select(range(4)))
    with pytest.raises(ValueError, match="not in it"):
        held.evaluate(dataset(4, 9))
    columns = held.train_dataset
    again = InfoPOTrainer(str(start), args=config(tmp_path, max_steps=2), **{**given, "train_dataset": columns})
    assert again.ref_model is None
    assert train(again)[0] == pytest.approx(run[0], rel=1e-4, abs=2e-4)


@pytest.mark.parametrize(("packed", "precomputed"), [(False, False), (True, False), (False, True), (True, True)])
def test_several_rejected_responses_and_weights(start: Path, tmp_path: Path, packed: bool, precomputed: bool) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"{index} + 2 = ", "chosen": f"{index + 2}.", "rejected": ["Nobody knows."], "weight": 0.5 + index}
        for index in range(4)
    ]
    rows[1]["rejected"] += ["7.", "A number."]
    args = config(tmp_path, max_steps=1, per_device_train_batch_size=4, padding_free=packed, model_init_kwargs={
        "dtype": "float32", "attn_implementation": "sdpa"}, precompute_ref_log_probs=precomputed)  # fmt: skip
    trainer = InfoPOTrainer(
        str(start), args=args, train_dataset=Dataset.from_list(rows), processing_class=byte_tokenizer(),
        ref_model=tiny_model(seed=3, initializer_range=0.1),
    )  # fmt: skip
    policy, reference = tiny_model(initializer_range=0.1), tiny_model(seed=3, initializer_range=0.1)

    def logps(module: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            tokens = module(ids).logits[0, :-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
        return tokens[len(prompt) - 1 :].sum()

    loss = 0.0
    for feature in trainer.train_dataset:
        rewards = [
            0.1 * float(logps(policy, feature["prompt_ids"], ids) - logps(reference, feature["prompt_ids"], ids))
            for ids in [feature["chosen_ids"], *feature["rejected_ids"]]
        ]
        pull = sum(math.exp(reward - 1) for reward in rewards[1:]) / (len(rewards) - 1)
        loss += feature["weight"] * (pull - rewards[0]) / 4
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_turns_that_are_not_scored(start: Path, tmp_path: Path, packed: bool) -> None:
    """Masks, weights and several rejected responses of features that are tokenised already, against plain float64."""
    args = config(tmp_path, max_steps=1, per_device_train_batch_size=3, padding_free=packed, beta=0.2)
    trainer = InfoPOTrainer(
        str(start), args=args, train_dataset=Dataset.from_list(unequal()), processing_class=byte_tokenizer(),
        ref_model=tiny_model(seed=1),
    )  # fmt: skip
    policy = tiny_model(initializer_range=0.1)  # `start`
    loss, metrics = plain_loss(policy, tiny_model(seed=1), unequal(), 0.2)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert logged["rewards/margins"] == pytest.approx(metrics["margins"], rel=1e-4)


def test_metrics_of_several_evaluations(start: Path, tmp_path: Path) -> None:
    given = {"train_dataset": dataset(4), "processing_class": byte_tokenizer()}
    sets = {"easy": dataset(4, 1), "hard": dataset(4, 2)}
    trainer = InfoPOTrainer(
        str(start),
        args=config(tmp_path),
        ref_model=tiny_model(seed=3, initializer_range=0.1),
        eval_dataset=sets,
        **given,
    )
    both = trainer.evaluate()
    test = trainer.evaluate(sets["hard"], metric_key_prefix="test")
    assert both["eval_hard_rewards/margins"] == test["test_rewards/margins"] != both["eval_easy_rewards/margins"]
    assert not any(name.startswith("eval_rewards") for name in {**both, **test})


def test_a_policy_that_was_changed_is_not_its_own_reference(start: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)  # trained before it was handed over; the reference is loaded from disk
    trainer = InfoPOTrainer(model, args=config(tmp_path), train_dataset=dataset(), processing_class=byte_tokenizer())
    with pytest.raises(RuntimeError, match="a model that was trained before"):
        trainer.train()


def test_a_stream_cannot_be_scored_ahead(tmp_path: Path) -> None:
    args = config(tmp_path, precompute_ref_log_probs=True)
    stream = dataset(4).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"the train dataset is a stream; .* `reference_logps`"):
        InfoPOTrainer(tiny_model(), tiny_model(), args, train_dataset=stream, processing_class=byte_tokenizer()).train()


def test_what_the_model_cannot_take_is_refused_before_a_step(tmp_path: Path) -> None:
    learned = save_tiny_model(tmp_path / "learned", architecture="gpt2", n_positions=64)
    given = {"train_dataset": dataset(4), "processing_class": byte_tokenizer()}
    with pytest.raises(ValueError, match=r"pair 0, .* tokens, and the model has learned positions for 64"):
        InfoPOTrainer(str(learned), args=config(tmp_path), **given)


@pytest.mark.parametrize("off", [True, False])
def test_disable_dropout_switches_off_what_it_says(tmp_path: Path, off: bool) -> None:
    """Dropout of attention is a number, not a module, so that TRL's own switch passes it by."""
    trainer = InfoPOTrainer(
        tiny_model(attention_dropout=0.1),
        args=config(tmp_path, disable_dropout=off, reference_free=True, model_init_kwargs=None),
        train_dataset=dataset(4),
        processing_class=byte_tokenizer(),
    )
    assert bool(random_parts(trainer.model)) is not off


def test_predict_takes_features(start: Path, tmp_path: Path) -> None:
    rows = dataset(4)
    trainer = InfoPOTrainer(str(start), args=config(tmp_path), train_dataset=rows, processing_class=byte_tokenizer())
    with pytest.raises(ValueError, match=r"`test_dataset` must hold features.*got rows of text.*evaluate\(dataset"):
        trainer.predict(rows)
    predicted = trainer.predict(feature_dataset(rows, byte_tokenizer(), MAX_LENGTH)).metrics
    evaluated = trainer.evaluate(rows, metric_key_prefix="test")
    for name in ("loss", "logps/chosen", "scored_tokens"):
        assert predicted[f"test_{name}"] == pytest.approx(evaluated[f"test_{name}"]), name
