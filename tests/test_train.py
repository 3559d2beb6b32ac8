"""`python -m infopo_kernels train` in one process: what it takes, what it leaves, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

for needed in ("trl", "datasets", "peft", "rich"):
    pytest.importorskip(needed)

import datasets  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from infopo_kernels.commands.cli import main  # noqa: E402
from infopo_kernels.commands.data import Data  # noqa: E402
from infopo_kernels.commands.options import make_parser, parse  # noqa: E402
from infopo_kernels.commands.resume import last_checkpoint  # noqa: E402

from .training_fixtures import save_tiny_model, tiny_model, write_pairs  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


def train(model: Any, data: Any, output: Any, *more: str) -> int:
    words = ["--model", str(model), "--data", str(data), "--output", str(output), "--device", "cpu"]
    return main(["train", *words, "--disable_tqdm", "true", *more])


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model.safetensors")


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_train_leaves_a_model_that_loads_and_has_changed(model: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "tuned"
    more = ("--batch", "2", "--held-out", "2", "--lr", "1e-2", "--save-every", "1", "--logging_steps", "1")
    assert train(model, data, output, *more) == 0
    tuned, start = (AutoModelForCausalLM.from_pretrained(path) for path in (output, model))
    assert AutoTokenizer.from_pretrained(output).chat_template
    changes = [(a - b).abs().max().item() for a, b in zip(tuned.parameters(), start.parameters(), strict=True)]
    assert all(change > 0 for change in changes)
    assert [r["step"] for r in records(output) if "loss" in r] == [1, 2], "4 pairs are one epoch of 2 batches"
    evaluations = [r for r in records(output) if "eval_loss" in r]
    assert [r["step"] for r in evaluations] == [0, 2]
    assert evaluations[0]["eval_rewards/margins"] == pytest.approx(0, abs=1e-4), "the reference is the start"
    AutoModelForCausalLM.from_pretrained(output / "checkpoint-1")
    printed = capsys.readouterr().out
    assert f"→ {evaluations[1]['eval_logps/chosen']:.2f}" in printed, "the table shows what the records hold"
    assert "4 pairs: 2 pairs a step on 1 process" in printed


def test_trls_names_and_yaml_are_the_short_names(model: Path, data: Path, tmp_path: Path) -> None:
    short = ("--lr", "1e-3", "--steps", "2", "--batch", "1", "--accumulate", "2", "--beta", "0.05", "--warmup", "0")
    assert train(model, data, tmp_path / "a", *short) == 0
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model_name_or_path: {model}\nlearning_rate: 0.001\nmax_steps: 7\nper_device_train_batch_size: 1\n"
        f"gradient_accumulation_steps: 2\nbeta: 0.05\nwarmup_steps: 0\nuse_cpu: true\ndisable_tqdm: true\n"
    )
    words = ["--config", str(config), "--dataset_name", str(data), "--output-dir", str(tmp_path / "b")]
    assert main(["train", *words, "--max_steps", "2"]) == 0, "a word beats the file"
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("merge", [False, True])
def test_train_with_lora(model: Path, data: Path, tmp_path: Path, merge: bool) -> None:
    output = tmp_path / "tuned"
    more = ["--lora-rank", "2", "--lr", "1e-2", "--steps", "2", "--batch", "2", *(["--merge-adapter"] if merge else [])]
    assert train(model, data, output, *more) == 0
    assert (output / "adapter_config.json").exists() != merge
    if not merge:
        config = json.loads((output / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (2, 4), "alpha is twice the rank"
        assert all(name in str(config["target_modules"]) for name in ("q_proj", "o_proj", "up_proj", "down_proj"))
        assert "lm_head" not in str(config["target_modules"])
    tuned, start = (AutoModelForCausalLM.from_pretrained(path) for path in (output, model))
    ids = torch.arange(3, 40)[None]
    assert (tuned(ids).logits - start(ids).logits).abs().max() > 1e-3
    assert torch.equal(tuned.get_output_embeddings().weight, start.get_output_embeddings().weight)


def test_defaults_are_shown_with_the_short_names() -> None:
    said = make_parser().format_help()
    for text in (
        "--lora-rank    --use_peft --lora_r ...",
        "learning_rate 1e-05",
        "torchrun --nproc-per-node",
        "smollm2",
    ):
        assert text in said
    assert make_parser().get_default("learning_rate") == 1e-5


BAD = [
    (["--beta", "0"], "`beta` must be"),
    (["--beta", "nan"], "`beta` must be"),
    (["--beta", "much"], "argument --beta: invalid float value: 'much'"),
    (["--steps", "0"], "--max_steps: expected a whole number from 1"),
    (["--batch", "two"], "argument --per_device_train_batch_size"),
    (["--batch", "0"], "--per_device_train_batch_size: expected a number above 0, got 0"),
    (["--lr", "-1"], "--learning_rate: expected a number above 0, got -1.0"),
    (["--lr", "nan"], "--learning_rate: expected a number above 0, got nan"),
    (["--lr", "inf"], "--learning_rate: expected a number above 0, got inf"),
    (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    (["--lr-scheduler-type", "zigzag"], "zigzag"),
    (["--no-such-option", "3"], "unknown option: --no-such-option 3"),
    (["--config", "nowhere.yaml"], "nowhere.yaml"),
    (["--config"], "--config expects a file"),
    (["--sft-weight", "-1"], "`sft_weight` must not be negative"),
    (["--max-log-weight", "0", "--min-log-weight", "1"], "`min_log_weight` must lie below `max_log_weight`"),
    (["--lora-alpha", "1"], "--lora_alpha has no meaning without --use_peft (short: --lora-rank R)"),
    (["--merge-adapter"], "--merge_adapter has no meaning without --use_peft"),
    (["--eval-every", "1"], "--eval_strategy steps needs pairs to score; add --held_out N"),
    (["--held-out", "6"], "leaves nothing to train on"),
    (["--held-out", "1", "--eval-data", "x"], "were both given"),
    (["--max-length", "5"], "no pair has two different responses to score within max_length 5"),
    (["--eval-data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["--resume-from-checkpoint", "nowhere"], "nowhere: is not a whole checkpoint"),
    (["--output", ""], "--output_dir (short: --output) is needed"),
]


@pytest.mark.parametrize(("options", "sentence"), BAD, ids=["-".join(case[0]).strip("-") for case in BAD])
def test_bad_input_is_one_sentence_and_code_2(
    model: Path, data: Path, tmp_path: Path, capsys: Any, options: list[str], sentence: str
) -> None:
    assert train(model, data, tmp_path / "tuned", *options) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence in said
    assert said.startswith("train: ")
    assert not (tmp_path / "tuned" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rate: [1, 2", "--config: is not YAML"),
        ("learning_rate: [1, 2]", "list"),
        ("no_such_option: 3", "unknown option: --no_such_option 3"),
        ("just words", "must contain a YAML mapping"),
    ],
)
def test_a_bad_file_of_options_is_one_sentence(
    model: Path, data: Path, tmp_path: Path, capsys: Any, text: str, said: str
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert train(model, data, tmp_path / "tuned", "--config", str(file)) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_damaged_model_is_one_sentence(model: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert train(damaged, data, tmp_path / "tuned") == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("train: ")


def test_data_is_checked_before_the_model_is_touched(tmp_path: Path, capsys: Any) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "Q", "chosen": "a"}\n')
    assert train("/no/such/model", data, tmp_path / "tuned") == 2
    assert f"{data}, line 1, field `rejected`: is missing" in capsys.readouterr().err
    write_pairs(data)
    assert train("/no/such/model", data, tmp_path / "tuned") == 2
    assert "`--model_name_or_path /no/such/model` cannot be loaded" in capsys.readouterr().err
    assert not (tmp_path / "tuned").exists(), "nothing was written for what cannot be used"


def test_bad_rows_are_left_out_when_asked(model: Path, tmp_path: Path, capsys: Any) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", 3)
    data.write_text(data.read_text() + '{"prompt": "Q", "chosen": "a"}\n')
    assert train(model, data, tmp_path / "tuned", "--steps", "1", "--skip-bad-rows") == 0
    printed = capsys.readouterr().out
    assert "1 of 4 rows cannot be used" in printed
    assert f"{data}, line 4, field `rejected`: is missing" in printed
    assert " on 3 pairs" in printed


@pytest.mark.parametrize("kind", ["file", "dataset"])
def test_score_turns_says_which_turns_of_the_data_are_scored(
    model: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "why?"}]
    row = {
        "prompt": [{"role": "user", "content": "x"}],
        "chosen": [*reply, {"role": "assistant", "content": "so"}],
        "rejected": [*reply, {"role": "assistant", "content": "no"}],
    }
    data = tmp_path / "turns.jsonl"
    data.write_text(json.dumps(row) + "\n")
    if kind == "dataset":
        rows = datasets.DatasetDict(train=datasets.Dataset.from_list([row]))
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
        data = Path("some/dataset")
    words = ["--model", str(model), "--data", str(data), "--output", str(tmp_path), "--use_cpu"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    for turns, unscored in (("all", 0), ("assistant", len("<|start|>user\nwhy?<|end|>\n<|start|>assistant\n"))):
        script, config, _, mixture = parse([*words, "--score_turns", turns], "train")
        ((feature,), _) = Data(script, config, mixture).features(tokenizer, None)
        mask = feature.get("chosen_mask") or [1]
        text = tokenizer.decode([t for t, m in zip(feature["chosen_ids"], mask, strict=False) if not m])
        assert len(text) == unscored


def test_what_the_model_cannot_take_is_said_before_any_work(tmp_path: Path, capsys: Any) -> None:
    """A pair beyond the learned positions; a token that the embedding has no row for; half a character."""
    short = save_tiny_model(tmp_path / "short", architecture="gpt2", n_positions=64)
    narrow = save_tiny_model(tmp_path / "narrow")
    tiny_model(vocab_size=200).save_pretrained(narrow)
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    half = tmp_path / "half.jsonl"
    half.write_text('{"prompt": "x", "chosen": " a\\ud83d", "rejected": " b"}\n')
    cases = ((short, pairs, "learned positions"), (narrow, pairs, "token id"), (narrow, half, "half of a character"))
    for model, data, said in cases:
        assert train(model, data, tmp_path / "tuned") == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "tuned").exists()


def test_a_step_that_is_not_finite_ends_in_one_line(model: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    assert train(model, data, tmp_path / "tuned", "--lr", "1", "--beta", "10", "--steps", "3", "--warmup", "0") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("train: Step ")
    assert "ower the learning rate" in said


STEPS = ("--steps", "3", "--batch", "2", "--lr", "1e-3", "--warmup", "0", "--logging_steps", "1")


def precompute(model: Path, data: Path, file: Path, *more: str) -> None:
    words = ["--model", str(model), "--data", str(data), "--output", str(file), "--use_cpu", *more]
    assert main(["precompute-reference", *words]) == 0


def test_a_file_of_references_takes_the_place_of_the_reference(
    model: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    """With all references, and without the chosen ones, which InfoPO's gradients do not need."""
    assert train(model, data, tmp_path / "scored here", *STEPS) == 0
    truth = weights(tmp_path / "scored here")
    for name, more in (("all", ()), ("half", ("--skip_chosen_reference",))):
        file = tmp_path / f"{name}.jsonl"
        precompute(model, data, file, *more)
        assert train(model, data, tmp_path / name, *STEPS, "--reference-logps", str(file)) == 0
        found = weights(tmp_path / name)
        assert max((found[key] - truth[key]).abs().max().item() for key in truth) < 1e-5
    assert "half.jsonl holds no chosen references" in capsys.readouterr().out
    steps = {name: [r for r in records(tmp_path / name) if "loss" in r] for name in ("scored here", "all", "half")}
    for mine, theirs in zip(steps["all"], steps["scored here"], strict=True):
        assert mine["rewards/chosen"] == pytest.approx(theirs["rewards/chosen"], abs=1e-4)
    assert all("rewards/chosen" not in record and "logps/chosen" in record for record in steps["half"])
    half = ("--reference-logps", str(tmp_path / "half.jsonl"))
    for more, said in (
        (("--loss", "dpo"), "holds no chosen references, and the gradients of --loss_type sigmoid need them"),
        (("--average",), "was computed with average=False, training has average=True"),
        (("--eval-data", str(write_pairs(tmp_path / "others.jsonl", 2, seed=1))), "takes the same --eval_dataset_name"),
    ):
        assert train(model, data, tmp_path / "refused", *STEPS, *half, *more) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def test_an_output_that_holds_something_is_left_alone(model: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "tuned"
    output.mkdir()
    (output / "precious").write_text("x")
    assert train(model, data, output, "--steps", "1") == 2
    assert "is not empty; pass another directory, --overwrite" in capsys.readouterr().err
    assert [p.name for p in output.iterdir()] == ["precious"]
    assert train(model, data, output, "--steps", "1", "--overwrite") == 0
    assert (output / "precious").exists()


def test_a_path_that_cannot_be_made(model: Path, data: Path, capsys: Any) -> None:
    assert train(model, data, data / "below-a-file") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_last_checkpoint_is_one_that_is_whole(tmp_path: Path) -> None:
    """The trainer writes the state last; with several processes each has a random state of its own."""

    def checkpoint(step: int, state: str | None, *files: str) -> Path:
        path = tmp_path / f"checkpoint-{step}"
        path.mkdir()
        for name in files:
            (path / name).touch()
        if state is not None:
            (path / "trainer_state.json").write_text(state)
        return path

    assert last_checkpoint(tmp_path, 1) is None
    one = checkpoint(9, '{"global_step": 9}', "rng_state.pth")
    two = checkpoint(10, '{"global_step": 10}', "rng_state_0.pth", "rng_state_1.pth")
    checkpoint(11, '{"global_step": 11}', "rng_state_0.pth")
    checkpoint(12, '{"global_st', "rng_state.pth")
    checkpoint(13, None, "rng_state.pth")
    assert last_checkpoint(tmp_path, 1) == one
    assert last_checkpoint(tmp_path, 2) == two
    assert last_checkpoint(tmp_path, 4) == tmp_path / "checkpoint-11", "none has four random states"


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.jsonl.gz", "pairs.parquet"])
def test_a_missing_file_is_not_looked_for_on_the_hub(name: str, model: Path, tmp_path: Path, capsys: Any) -> None:
    assert train(model, tmp_path / name, tmp_path / "out") == 2
    assert "no such file" in capsys.readouterr().err
