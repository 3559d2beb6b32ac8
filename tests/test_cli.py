"""The command line: exit codes, sentences, and what `train` leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from infopo_kernels.cli import main

from .training_fixtures import save_tiny_model, write_pairs

for needed in ("transformers", "rich", "matplotlib"):
    pytest.importorskip(needed)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "pairs.jsonl")


def train(model: Any, data: Any, output: Any, *more: str) -> int:
    return main(["train", "--model", str(model), "--data", str(data), "--output", str(output), *more])


def test_train_leaves_a_model_that_loads_and_has_changed(model: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / "tuned"
    code = train(model, data, output, "--batch", "2", "--held-out", "2", "--lr", "1e-2", "--save-every", "1")
    assert code == 0
    tuned, start = (AutoModelForCausalLM.from_pretrained(path) for path in (output, model))
    assert AutoTokenizer.from_pretrained(output).chat_template
    changes = [(a - b).abs().max().item() for a, b in zip(tuned.parameters(), start.parameters(), strict=True)]
    assert all(change > 0 for change in changes)
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["split"] == "train"] == [1, 2], "4 pairs are one epoch of 2 batches"
    assert [r["step"] for r in records if r["split"] == "held_out"] == [0, 2]
    assert (output / "training.png").read_bytes().startswith(b"\x89PNG")
    AutoModelForCausalLM.from_pretrained(output / "checkpoint-1")
    printed = capsys.readouterr().out
    after = next(r for r in reversed(records) if r["split"] == "held_out")
    assert f"{after['chosen_logps']:.2f}" in printed, "the table shows what the records hold"


@pytest.mark.parametrize(
    "options",
    [
        ["--loss", "dpo"],
        ["--average", "--sft-weight", "0.1", "--max-log-weight", "2", "--beta", "1"],
        ["--dtype", "bfloat16", "--gradient-checkpointing"],
        ["--accumulate", "2", "--schedule", "cosine", "--backend", "torch"],
    ],
    ids=["dpo", "objective", "bfloat16", "loop"],
)
def test_train_takes_its_options(model: Path, data: Path, tmp_path: Path, options: list[str]) -> None:
    output = tmp_path / "tuned"
    assert train(model, data, output, "--steps", "2", "--batch", "2", *options) == 0
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2
    assert all(record["loss"] is not None for record in records)


@pytest.mark.parametrize("merge", [False, True])
def test_train_with_lora(model: Path, data: Path, tmp_path: Path, merge: bool) -> None:
    pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    output = tmp_path / "tuned"
    more = ["--lora-rank", "2", "--lr", "1e-2", "--steps", "2", "--batch", "2", *(["--merge-adapter"] if merge else [])]
    assert train(model, data, output, *more) == 0
    assert (output / "adapter_config.json").exists() != merge
    tuned, start = (AutoModelForCausalLM.from_pretrained(path) for path in (output, model))
    ids = torch.arange(3, 40)[None]
    assert (tuned(ids).logits - start(ids).logits).abs().max() > 1e-3
    assert torch.equal(tuned.get_output_embeddings().weight, start.get_output_embeddings().weight)


@pytest.fixture
def reference(model: Path, data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "pairs.reference.jsonl"
    assert precompute(model, data, path) == 0
    return path


def precompute(model: Path, data: Path, output: Path, *more: str) -> int:
    words = ["--model", str(model), "--data", str(data), "--output", str(output), "--overwrite", *more]
    return main(["precompute-reference", *words])


def records_of(output: Path) -> list[dict[str, Any]]:
    clock = ("seconds", "peak_memory_mib")
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """What can be compared closely; at the start responses tie, and rounding decides who wins."""
    return {k: v for k, v in record.items() if not isinstance(v, str) and k != "reward_accuracy"}


STEPS = ("--steps", "3", "--batch", "2", "--lr", "1e-2", "--beta", "0.01")


@pytest.mark.parametrize("more", [[], ["--held-out", "2"], ["--loss", "dpo"], ["--lora-rank", "2"]], ids=str)
def test_train_with_a_reference_file_is_train_without_its_pass(
    model: Path, data: Path, reference: Path, tmp_path: Path, capsys: Any, more: list[str]
) -> None:
    if "--lora-rank" in more:
        pytest.importorskip("peft")
    scored_here, read = tmp_path / "a", tmp_path / "b"
    torch.manual_seed(0)  # of adapters
    assert train(model, data, scored_here, *STEPS, *more) == 0
    assert "Reference log-probabilities" in capsys.readouterr().out
    torch.manual_seed(0)
    assert train(model, data, read, *STEPS, *more, "--reference-logps", str(reference)) == 0
    assert "Reference log-probabilities" not in capsys.readouterr().out
    for mine, theirs in zip(records_of(read), records_of(scored_here), strict=True):
        assert numbers(mine) == pytest.approx(numbers(theirs), rel=1e-3, abs=1e-3)


def test_a_reference_file_is_what_training_measures_from(
    model: Path, data: Path, reference: Path, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in reference.read_text().splitlines()]
    for line in lines[1:]:
        line["chosen"] += 3.0
        line["rejected"] -= 2.0
    reference.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert train(model, data, tmp_path / "tuned", *STEPS, "--reference-logps", str(reference)) == 0
    first = records_of(tmp_path / "tuned")[0]
    assert first["chosen_log_ratio"] == pytest.approx(-3, abs=1e-3)
    assert first["rejected_log_ratio"] == pytest.approx(2, abs=1e-3)


def test_without_chosen_references_the_weights_are_the_same_and_the_log_says_what_it_does_not_know(
    model: Path, data: Path, reference: Path, tmp_path: Path, capsys: Any
) -> None:
    from safetensors.torch import load_file

    half = tmp_path / "half.jsonl"
    assert precompute(model, data, half, "--skip-chosen-reference") == 0
    runs = []
    for name, file in (("whole", reference), ("half", half)):
        more = ("--held-out", "2", "--reference-logps", str(file))
        assert train(model, data, tmp_path / name, *STEPS, *more) == 0
        runs.append((load_file(tmp_path / name / "model.safetensors"), records_of(tmp_path / name)))
    assert "holds no chosen references" in capsys.readouterr().out
    (whole, whole_records), (halved, records) = runs
    assert all(torch.equal(whole[name], halved[name]) for name in whole)
    unknown = ("chosen_log_ratio", "reward_accuracy", "reward_margin", "mi_lower_bound")
    for mine, theirs in zip(records, whole_records, strict=True):
        if mine["split"] == "held_out":  # scored by the model before its first step
            assert numbers(mine) == pytest.approx(numbers(theirs), rel=1e-6, abs=1e-6)
            continue
        assert all(mine[name] is None for name in unknown)
        known = [name for name in numbers(mine) if name not in (*unknown, "loss")]
        assert [mine[name] for name in known] == pytest.approx([theirs[name] for name in known], rel=1e-6)
        ref_chosen = theirs["chosen_logps"] - theirs["chosen_log_ratio"]
        assert mine["loss"] == pytest.approx(theirs["loss"] - 0.01 * ref_chosen, rel=1e-4), "shifted, no more"


MISMATCHES = [
    ("another model", "was computed with another model"),
    ("other data", "a pair of the data is not in it"),
    ("--average", "was computed with average=False, training has average=True"),
    ("--max-length 500", "was computed with max_length=1024, training has max_length=500"),
    ("no such file", "no such file; write it with"),
    ("half, dpo", "holds no chosen references, and DPO's gradients need them"),
    ("cut short", "holds 4 of 6 pairs"),
]


@pytest.mark.parametrize(("what", "sentence"), MISMATCHES, ids=[what for what, _ in MISMATCHES])
def test_a_reference_file_that_does_not_fit_is_refused(
    model: Path, data: Path, reference: Path, tmp_path: Path, capsys: Any, what: str, sentence: str
) -> None:
    more = what.split() if what.startswith("--") else []
    if what == "another model":
        save_tiny_model(model, seed=1)
    elif what == "other data":
        write_pairs(data, seed=1)
    elif what == "no such file":
        reference.unlink()
    elif what == "half, dpo":
        assert precompute(model, data, reference, "--skip-chosen-reference") == 0
        more = ["--loss", "dpo"]
    elif what == "cut short":
        reference.write_text("".join(reference.read_text().splitlines(keepends=True)[:5]))
    output = tmp_path / "tuned"
    assert train(model, data, output, *STEPS, *more, "--reference-logps", str(reference)) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"train: --reference-logps {reference}: ")
    assert sentence in said
    assert "\n" not in said
    assert not (output / "metrics.jsonl").exists()


def test_pairs_to_score_need_not_be_in_the_reference_file(
    model: Path, data: Path, reference: Path, tmp_path: Path
) -> None:
    more = ("--eval-data", str(write_pairs(tmp_path / "others.jsonl", 2, seed=1)))
    for name, file in (("a", ()), ("b", ("--reference-logps", str(reference)))):
        assert train(model, data, tmp_path / name, *STEPS, *more, *file) == 0
    for mine, theirs in zip(records_of(tmp_path / "b"), records_of(tmp_path / "a"), strict=True):
        assert numbers(mine) == pytest.approx(numbers(theirs), rel=1e-3, abs=1e-3)


BAD = [
    (["--beta", "0"], "argument --beta: expected a number above 0, got '0'"),
    (["--beta", "nan"], "argument --beta: expected a finite number, got 'nan'"),
    (["--steps", "0"], "argument --steps: expected a whole number from 1, got '0'"),
    (["--batch", "two"], "argument --batch: expected a whole number from 1, got 'two'"),
    (["--warmup", "2"], "argument --warmup: expected a number from 0 to 1"),
    (["--loss", "ppo"], "argument --loss: invalid choice: 'ppo'"),
    (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    (["--device", "nonsense"], "--device nonsense:"),
    (["--sft-weight", "-1"], "`sft_weight` must not be negative"),
    (["--max-log-weight", "0", "--min-log-weight", "1"], "`min_log_weight` must lie below `max_log_weight`"),
    (["--loss", "dpo", "--max-log-weight", "1"], "--max-log-weight has no meaning with --loss dpo"),
    (["--lora-alpha", "1"], "--lora-alpha has no meaning without --lora-rank"),
    (["--eval-every", "1"], "--eval-every needs pairs to score"),
    (["--held-out", "6"], "leaves nothing to train on"),
    (["--held-out", "1", "--eval-data", "x"], "were both given"),
    (["--max-length", "5"], "no pair has two different responses to score within --max-length 5"),
    (["--eval-data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
]


def run(*words: str) -> int:
    try:
        return main(words)
    except SystemExit as stop:  # argparse's way
        return int(stop.code or 0)


@pytest.mark.parametrize(("options", "sentence"), BAD, ids=["-".join(case[0]).strip("-") for case in BAD])
def test_bad_input_is_one_sentence_and_code_2(
    model: Path, data: Path, tmp_path: Path, capsys: Any, options: list[str], sentence: str
) -> None:
    words = ["train", "--model", str(model), "--data", str(data), "--output", str(tmp_path / "tuned"), *options]
    assert run(*words) == 2
    said = capsys.readouterr().err.strip()
    assert sentence in said
    assert "\n" not in said
    assert not (tmp_path / "tuned" / "metrics.jsonl").exists()


def test_data_is_checked_before_the_model_is_touched(tmp_path: Path, capsys: Any) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "Q", "chosen": "a"}\n')
    assert train("/no/such/model", data, tmp_path / "tuned") == 2
    assert f"{data}, line 1, field `rejected`: is missing" in capsys.readouterr().err
    assert not (tmp_path / "tuned").exists(), "nothing was written for data that cannot be used"
    write_pairs(data)
    assert train("/no/such/model", data, tmp_path / "tuned") == 2
    assert "`--model /no/such/model` cannot be loaded" in capsys.readouterr().err


def test_an_output_that_holds_something_is_left_alone(model: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "tuned"
    output.mkdir()
    (output / "precious").write_text("x")
    assert train(model, data, output, "--steps", "1") == 2
    assert "is not empty; pass another directory, or --overwrite" in capsys.readouterr().err
    assert [p.name for p in output.iterdir()] == ["precious"]
    assert train(model, data, output, "--steps", "1", "--overwrite") == 0
    assert (output / "precious").exists()


def test_a_path_that_cannot_be_made(model: Path, data: Path, capsys: Any) -> None:
    assert train(model, data, data / "below-a-file") == 2
    assert "cannot be made" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["demo", "--help"], ["--version"]])
def test_help(words: list[str], capsys: Any) -> None:
    assert run(*words) == 0
    said = capsys.readouterr().out
    assert "infopo_kernels" in said
    if words == ["train", "--help"]:
        for option in ("--lora-rank", "--max-log-weight", "--data", "--dtype"):
            assert option in said


def test_unknown_and_missing_commands(capsys: Any) -> None:
    assert run("nonsense") == 2
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err
    assert run() == 2
    assert "COMMAND" in capsys.readouterr().err


def test_info_names_versions_and_backends(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the interpreter, which other tests use, stands in for a GPU
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in said
    for backend in ("cpp", "triton", "torch"):
        assert f"  {backend}: " in said
    assert "triton: not available: " in said or torch.cuda.is_available()


def test_info_needs_torch_only() -> None:
    code = (
        "import sys\n"
        "from infopo_kernels.cli import main\n"
        "assert main(['info']) == 0\n"
        "print([m for m in ('transformers', 'rich', 'matplotlib', 'peft', 'trl') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_missing_package_is_named(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["train"]) == 2
    assert "needs the package `transformers`; run: pip install 'infopo_kernels[train]'" in capsys.readouterr().err


def test_an_interruption_is_no_traceback(
    model: Path, data: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("infopo_kernels.training.train_command.run", interrupt)
    assert train(model, data, tmp_path / "tuned", "--steps", "1") == 130
    assert "interrupted" in capsys.readouterr().err
