"""Reference log-probabilities ahead of time, examples, and imports that wait."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from infopo_kernels import reference_logps
from infopo_kernels.integrations.collators import preference_features
from infopo_kernels.reference_logps import ReferenceTable, model_fingerprint
from infopo_kernels.training.tokens import encode
from tests.training_fixtures import byte_tokenizer, save_tiny_model, tiny_model, write_pairs

ROOT = Path(__file__).parents[1]


@pytest.fixture
def job(tmp_path: Path) -> tuple[list[str], Path]:
    """A command, and the file that it writes."""
    model, data, output = save_tiny_model(tmp_path / "model"), write_pairs(tmp_path / "pairs.jsonl", 5), tmp_path / "r"
    command = ["--model", str(model), "--data", str(data), "--output", str(output), "--batch", "2"]
    return [*command, "--max-length", "400"], output


def rows_of(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]


def test_values_are_those_of_the_models_own_logits(job: tuple[list[str], Path], tmp_path: Path) -> None:
    command, output = job
    assert reference_logps.main(command) == 0
    table = ReferenceTable.read(output)
    model = tiny_model()
    table.check_model(model)
    features = preference_features(byte_tokenizer(), rows_of(tmp_path), 400)
    assert len(features) == 5
    for feature in features:
        found = table.lookup(feature)
        for half in ("chosen", "rejected"):
            ids = torch.tensor([feature["prompt_ids"] + feature[f"{half}_ids"]])
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
            truth = logps[len(feature["prompt_ids"]) - 1 :].sum()
            assert found[f"ref_{half}_logps"] == pytest.approx(float(truth), rel=1e-5)


def test_a_killed_run_goes_on_where_it_was(
    job: tuple[list[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, output = job
    assert reference_logps.main(command) == 0
    whole = output.read_text()
    lines = whole.splitlines(keepends=True)
    output.write_text("".join(lines[:3]) + lines[3][:17])  # header, two pairs, and part of a third
    with pytest.raises(ValueError, match="holds 2 of 5 pairs"):
        ReferenceTable.read(output)
    scored: list[int] = []
    score = reference_logps._score

    def counted(policy: Any, examples: Any, *rest: Any) -> Any:
        scored.append(len(examples))
        return score(policy, examples, *rest)

    monkeypatch.setattr(reference_logps, "_score", counted)
    assert reference_logps.main(command) == 0
    assert scored == [2, 1]
    assert "2 of 5 pairs already" in capsys.readouterr().out
    finished = ReferenceTable.read(output)
    output.write_text(whole)
    for key, values in ReferenceTable.read(output).values.items():  # other batches round differently
        assert finished.values[key] == pytest.approx(values, rel=1e-6)


def test_another_model_data_or_option_is_not_continued(
    job: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, output = job
    assert reference_logps.main(command) == 0
    assert reference_logps.main([*command, "--average"]) == 2
    assert "made from another average" in capsys.readouterr().err
    assert reference_logps.main([*command, "--average", "--overwrite"]) == 0
    assert ReferenceTable.read(output).header.average
    other = save_tiny_model(tmp_path / "other", seed=1)
    assert reference_logps.main([*command, "--average", "--model", str(other)]) == 2
    assert "made from another model" in capsys.readouterr().err
    output.write_text("something else\n")
    assert reference_logps.main(command) == 2
    assert "is not a file of reference" in capsys.readouterr().err


def test_skipping_the_chosen_half(job: tuple[list[str], Path], tmp_path: Path) -> None:
    command, output = job
    assert reference_logps.main(command) == 0
    both = ReferenceTable.read(output)
    assert reference_logps.main([*command, "--skip-chosen-reference", "--overwrite"]) == 0
    table = ReferenceTable.read(output)
    for key, (chosen, rejected) in table.values.items():
        assert chosen is None
        assert rejected == pytest.approx(both.values[key][1], rel=1e-6)
    with pytest.raises(ValueError, match="skip_chosen_reference"):
        table.check_options(average=False, max_length=400, skip_chosen=False)
    from infopo_kernels.training.data import parse_preference

    values = table.of_examples([encode(byte_tokenizer(), parse_preference(row)) for row in rows_of(tmp_path)])
    assert values[:, 0].isnan().all()
    assert values[:, 1].isfinite().all()


def test_fingerprints_know_a_changed_weight_but_not_a_type_or_an_adapter() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model()
    first = model_fingerprint(model)
    assert model_fingerprint(tiny_model(seed=1)) != first
    assert model_fingerprint(tiny_model().to(torch.bfloat16)) == first
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", modules_to_save=["lm_head"])
    assert model_fingerprint(peft.get_peft_model(model, config)) == first
    changed = tiny_model()
    with torch.no_grad():
        changed.model.norm.weight.mul_(1.1)
    assert model_fingerprint(changed) != first
    with pytest.raises(ValueError, match="unsharded"):
        model_fingerprint(tiny_model().to("meta"))


@pytest.mark.parametrize("size", [1, 1024, 1025, 28_311_552])
def test_a_fingerprint_reaches_from_the_first_value_of_a_weight_to_the_last(size: int) -> None:
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.zeros(size, dtype=torch.bfloat16))
    first = model_fingerprint(model)
    for entry in (0, size - 1):
        with torch.no_grad():
            model.weight.zero_()[entry] = 1.0
        assert model_fingerprint(model) != first


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)


def test_without_trl_and_transformers_the_package_works_and_says_how_to_install() -> None:
    code = """
import sys
for name in ("trl", "transformers"):
    sys.modules[name] = None
import infopo_kernels, infopo_kernels.integrations
assert not any(name.startswith("infopo_kernels.integrations.") for name in sys.modules)
for module, extra in (("trl", "train"), ("transformers", "train"), ("trainer", "train")):
    try:
        __import__(f"infopo_kernels.integrations.{module}")
    except ImportError as error:
        assert "pip install 'infopo_kernels[" in str(error), error
    else:
        raise AssertionError(module)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    without_trl = run_python("import sys; sys.modules['trl'] = None; import infopo_kernels.integrations.trl")
    assert "pip install 'infopo_kernels[trl]'" in without_trl.stderr


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("other_losses.py", ["--loss", "orpo", "--steps", "2"]),
        ("train_transformers.py", ["--steps", "2"]),
        ("train_trl.py", ["--steps", "2", "--lora-rank", "4"]),
    ],
)
def test_examples_run(script: str, arguments: list[str], tmp_path: Path) -> None:
    if script == "train_trl.py":
        pytest.importorskip("trl")
    model = save_tiny_model(tmp_path / "model", initializer_range=0.05)
    options = [] if script == "other_losses.py" else ["--output", str(tmp_path / "out")]
    code = f"import runpy; runpy.run_path('examples/{script}', run_name='__main__')"
    done = run_python(code, "--model", str(model), *options, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    if options:
        saved = {path.name for path in (tmp_path / "out").iterdir()}
        assert saved & {"model.safetensors", "adapter_model.safetensors"}
