"""Reference log-probabilities ahead of time: the command, its file, and the identity of its model."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

from infopo_kernels import reference_logps  # noqa: E402
from infopo_kernels.commands import cli, precompute_reference  # noqa: E402
from infopo_kernels.integrations.adapters import adapter_in, check_start, load_policy  # noqa: E402
from infopo_kernels.integrations.preferences import PreferenceWarning, preference_features  # noqa: E402
from infopo_kernels.integrations.references import ReferenceTable, model_fingerprint, model_identity  # noqa: E402
from tests.training_fixtures import byte_tokenizer, save_tiny_model, tiny_model, write_pairs  # noqa: E402

ROOT = Path(__file__).parents[1]


def run(command: list[str]) -> int:
    return cli.main(["precompute-reference", *command])


@pytest.fixture
def job(tmp_path: Path) -> tuple[list[str], Path]:
    """A command, and the file that it writes."""
    model, data, output = save_tiny_model(tmp_path / "model"), write_pairs(tmp_path / "pairs.jsonl", 5), tmp_path / "r"
    command = ["--model", str(model), "--data", str(data), "--output", str(output), "--batch", "2"]
    return [*command, "--max-length", "400", "--use_cpu"], output


def rows_of(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]


def plain_logps(model: Any, feature: dict[str, Any], response: list[int]) -> float:
    """From the model's own logits, in float64."""
    ids = torch.tensor([feature["prompt_ids"] + response])
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
    return float(logps[len(feature["prompt_ids"]) - 1 :].sum())


def test_values_are_those_of_the_models_own_logits(job: tuple[list[str], Path], tmp_path: Path) -> None:
    command, output = job
    assert run(command) == 0
    table = ReferenceTable.read(output)
    model = tiny_model()
    table.check_model(model)
    header = table.header
    assert (header.adapter, header.dtype, header.average, header.max_length) == (None, "float32", False, 400)
    features = preference_features(byte_tokenizer(), rows_of(tmp_path), 400)
    assert len(features) == header.pairs == 5
    for feature in features:
        found = table.lookup(feature)
        for half in ("chosen", "rejected"):
            truth = plain_logps(model, feature, feature[f"{half}_ids"])
            assert found[f"ref_{half}_logps"] == pytest.approx(truth, rel=1e-5)
    with pytest.raises(ValueError, match="not in it"):
        table.lookup({"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]})
    assert reference_logps.ReferenceTable is ReferenceTable


@pytest.mark.parametrize("skip", [False, True])
def test_several_rejected_responses_and_turns_that_are_not_scored(tmp_path: Path, skip: bool) -> None:
    model, output = save_tiny_model(tmp_path / "model"), tmp_path / "r"

    def turn(role: str, text: str, **more: Any) -> dict[str, Any]:
        return {"role": role, "content": text, **more}

    long = [turn("assistant", "one", weight=0), turn("user", "two", weight=0), turn("assistant", "three")]
    rows = [
        {
            "prompt": [turn("user", "Q")],
            "chosen": [turn("assistant", "a")],
            "rejected": [long, [turn("assistant", "b")]],
        },
        {"prompt": [turn("user", "R")], "chosen": long, "rejected": [[turn("assistant", "c")]]},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--model", str(model), "--data", str(tmp_path / "p.jsonl"), "--output", str(output), "--use_cpu"]
    assert run([*command, *(["--skip-chosen-reference"] if skip else [])]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()][1:]
    assert [isinstance(line["rejected"], list) for line in lines] == [True, False]
    table = ReferenceTable.read(output)
    first, second = preference_features(byte_tokenizer(), rows)
    stream = datasets.IterableDataset.from_generator(lambda: iter([first, second])).map(table.lookup)
    values = list(stream)
    plain = tiny_model()
    assert values[0]["ref_rejected_logps"][1] == pytest.approx(
        plain_logps(plain, first, first["rejected_ids"][1]), rel=1e-5
    )
    assert len(values[1]["ref_rejected_logps"]) == 1
    if skip:
        assert [value["ref_chosen_logps"] for value in values] == [None, None]
    else:
        # Of the three turns only the last is scored, in the context of the others.
        ids, mask = second["chosen_ids"], second["chosen_mask"]
        begin = mask.index(1)
        context = {"prompt_ids": second["prompt_ids"] + ids[:begin]}
        assert values[1]["ref_chosen_logps"] == pytest.approx(plain_logps(plain, context, ids[begin:]), rel=1e-5)
    everything = {key: value for key, value in second.items() if not key.endswith("_mask")}
    with pytest.raises(ValueError, match="score_turns"):
        table.lookup(everything)


def test_a_killed_run_goes_on_where_it_was(
    job: tuple[list[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, output = job
    assert run(command) == 0
    complete = output.read_text()
    lines = complete.splitlines(keepends=True)
    output.write_text("".join(lines[:3]) + lines[3][:17])  # header, two pairs, and part of a third
    with pytest.raises(ValueError, match="holds 2 of 5 pairs"):
        ReferenceTable.read(output)
    scored: list[int] = []
    score = precompute_reference._Scorer.__call__

    def counted(self: Any, features: Any) -> Any:
        scored.append(len(features))
        return score(self, features)

    monkeypatch.setattr(precompute_reference._Scorer, "__call__", counted)
    assert run(command) == 0
    assert scored == [2, 1]
    assert "2 of 5 pairs already" in capsys.readouterr().out
    finished = ReferenceTable.read(output)
    output.write_text(complete)
    for key, (chosen, rejected) in ReferenceTable.read(output).values.items():  # other batches round differently
        assert finished.values[key][0] == pytest.approx(chosen, rel=1e-6)
        assert finished.values[key][1] == pytest.approx(rejected, rel=1e-6)


def test_two_processes_write_what_one_writes(job: tuple[list[str], Path], tmp_path: Path) -> None:
    command, output = job
    assert run(command) == 0
    truth = ReferenceTable.read(output)
    both = tmp_path / "both"
    words = [*command, "--output", str(both)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "infopo_kernels",
         "precompute-reference", *words],
        capture_output=True, text=True, timeout=200, cwd=ROOT, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = ReferenceTable.read(both)
    assert found.header == truth.header
    assert list(found.values) == list(truth.values)
    for key, (chosen, rejected) in truth.values.items():
        assert found.values[key][0] == pytest.approx(chosen, rel=1e-6)
        assert found.values[key][1] == pytest.approx(rejected, rel=1e-6)


def test_another_model_data_or_option_is_not_continued(
    job: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, output = job
    assert run(command) == 0
    assert run([*command, "--average"]) == 2
    assert "made from another average" in capsys.readouterr().err
    assert run([*command, "--average", "--overwrite"]) == 0
    assert ReferenceTable.read(output).header.average
    other = save_tiny_model(tmp_path / "other", seed=1)
    assert run([*command, "--average", "--model", str(other)]) == 2
    assert "made from another model" in capsys.readouterr().err
    assert run([*command, "--average", "--bf16", "true"]) == 2
    assert "made from another dtype" in capsys.readouterr().err
    output.write_text("something else\n")
    assert run(command) == 2
    assert "is not a file of reference" in capsys.readouterr().err
    output.write_text(json.dumps({"format": "infopo_kernels.reference_logps", "version": 1}) + "\n")
    with pytest.raises(ValueError, match=r"format infopo_kernels.reference_logps 1, expected .* 2; compute"):
        ReferenceTable.read(output)


def test_skipping_the_chosen_half(job: tuple[list[str], Path], tmp_path: Path) -> None:
    command, output = job
    assert run(command) == 0
    both = ReferenceTable.read(output)
    assert run([*command, "--skip-chosen-reference", "--overwrite"]) == 0
    table = ReferenceTable.read(output)
    for key, (chosen, rejected) in table.values.items():
        assert chosen is None
        assert rejected == pytest.approx(both.values[key][1], rel=1e-6)
    with pytest.raises(ValueError, match="skip_chosen_reference"):
        table.check_options(average=False, max_length=400, skip_chosen=False)
    table.check_options(average=False, max_length=400, skip_chosen=True, dtype=torch.float32)
    with pytest.warns(PreferenceWarning, match=r"computed in float32, and the policy computes in bfloat16"):
        table.check_options(average=False, max_length=400, skip_chosen=True, dtype=torch.bfloat16)


# Identity of a model.


def test_fingerprints_know_a_changed_weight_but_not_a_type() -> None:
    first = model_fingerprint(tiny_model())
    assert model_fingerprint(tiny_model(seed=1)) != first
    assert model_fingerprint(tiny_model().to(torch.bfloat16)) == first
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


_TARGET = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
FRESH: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(**_TARGET, r=2),
    "lora-orthogonal": lambda: peft.LoraConfig(**_TARGET, r=2, init_lora_weights="orthogonal"),
    "lora-bias": lambda: peft.LoraConfig(**_TARGET, r=2, lora_bias=True),
    "adalora": lambda: peft.AdaLoraConfig(**_TARGET, total_step=10),
    "dora": lambda: peft.LoraConfig(**_TARGET, r=2, use_dora=True),
    "lora-on-everything": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["embed_tokens", "o_proj"]
    ),
    "lora-saved-head": lambda: peft.LoraConfig(**_TARGET, r=2, modules_to_save=["lm_head"]),
    "lora-tokens": lambda: peft.LoraConfig(**_TARGET, r=2, trainable_token_indices=[5, 7]),
    "tokens": lambda: peft.TrainableTokensConfig(
        task_type="CAUSAL_LM", token_indices=[5], target_modules=["embed_tokens"]
    ),
    "ia3": lambda: peft.IA3Config(**_TARGET, feedforward_modules=[]),
    "vera": lambda: peft.VeraConfig(**_TARGET, r=2),
    "loha": lambda: peft.LoHaConfig(**_TARGET, r=2),
    "lokr": lambda: peft.LoKrConfig(**_TARGET, r=2),
    "oft": lambda: peft.OFTConfig(**_TARGET, oft_block_size=4, r=0),
    "boft": lambda: peft.BOFTConfig(**_TARGET, boft_block_size=4),
    "hra": lambda: peft.HRAConfig(**_TARGET, r=2),
    "fourier": lambda: peft.FourierFTConfig(**_TARGET, n_frequency=8, init_weights=True),
    "ln": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
    "adaption-prompt": lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1),
}


@pytest.mark.parametrize("method", FRESH)
def test_a_fresh_adapter_does_not_count_and_a_trained_one_does(method: str) -> None:
    plain = model_identity(tiny_model())
    model = peft.get_peft_model(tiny_model(), FRESH[method]())
    assert model_identity(model) == plain
    assert model.training  # as it was
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    # A step of training, in which every parameter of the adapter moves.
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1 * torch.randn_like(parameter))
    base, adapter = model_identity(model)
    assert base == plain[0]
    assert adapter is not None
    assert adapter.split()[0] in str(model.peft_config["default"].peft_type)
    assert model_fingerprint(model) != plain[0]
    assert all(p.requires_grad for p in trained)
    with model.disable_adapter():
        assert model_identity(model) == plain
    with torch.no_grad():
        trained[0].add_(0.1)
    assert model_identity(model) not in (plain, (base, adapter))


@pytest.mark.parametrize("method", ["lora", "lora-saved-head", "lora-tokens"])
def test_the_usual_adapters_are_told_without_running_the_model(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft.get_peft_model(tiny_model(), FRESH[method]())
    monkeypatch.setattr(model.get_base_model(), "forward", None)
    assert model_identity(model)[1] is None


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["prompt", "prefix"],
)
def test_a_learned_prompt_counts_unless_it_is_off(config: Callable[[], Any]) -> None:
    plain = model_identity(tiny_model())
    model = peft.get_peft_model(tiny_model(), config())
    base, adapter = model_identity(model)
    assert base == plain[0]
    assert adapter is not None
    with model.disable_adapter():
        assert model_identity(model) == plain


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_a_compiled_model_is_the_same_model(where: str) -> None:
    plain = model_identity(tiny_model())
    assert model_identity(torch.compile(tiny_model())) == plain
    for fresh in (True, False):
        config = peft.LoraConfig(**_TARGET, r=2, init_lora_weights=fresh)
        torch.manual_seed(1)
        eager = model_identity(peft.get_peft_model(tiny_model(), config))
        torch.manual_seed(1)
        if where == "outside":
            model = torch.compile(peft.get_peft_model(tiny_model(), config))
        else:
            model = peft.get_peft_model(torch.compile(tiny_model()), config)
        assert model_identity(model) == eager
        assert (eager == plain) == fresh


def test_injected_and_inactive_adapters() -> None:
    plain = model_identity(tiny_model())
    for fresh in (True, False):
        config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=fresh)
        injected = peft.inject_adapter_in_model(config, tiny_model())
        base, adapter = model_identity(injected)
        assert base == plain[0]
        assert (adapter is None) == fresh
    for module in injected.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.enable_adapters(False)
    assert model_identity(injected) == plain
    two = peft.get_peft_model(tiny_model(), FRESH["lora"]())
    two.add_adapter("other", peft.LoraConfig(**_TARGET, r=2, init_lora_weights=False))
    assert model_identity(two) == plain  # the trained one is not active
    two.set_adapter("other")
    assert model_identity(two)[1] is not None


_PARTITIONED = """
import sys, torch
import torch.distributed as dist
import peft
from tests.training_fixtures import tiny_model
from infopo_kernels.integrations.references import model_identity

def lora(fresh):
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2, init_lora_weights=fresh)
    torch.manual_seed(4)
    return peft.get_peft_model(tiny_model(), config)

if {way!r} == "zero3":
    import deepspeed
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # compiled for minutes, and not needed
    deepspeed.init_distributed("gloo")

    def partition(model):
        config = {{"train_batch_size": 2, "zero_optimization": {{"stage": 3}}}}
        deepspeed.zero.Init(module=model, config_dict_or_path=config, remote_device="cpu")
else:
    from torch.distributed.fsdp import fully_shard
    dist.init_process_group("gloo")
    partition = fully_shard
for make in (tiny_model, lambda: lora(True), lambda: lora(False)):
    truth, model = model_identity(make()), make()
    partition(model)
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in model.parameters())
    assert held < sum(p.numel() for p in make().parameters()), held
    assert model_identity(model) == truth
config = peft.IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[])
model = peft.get_peft_model(tiny_model(), config)
partition(model)
try:
    model_identity(model)
except ValueError as error:
    assert "IA3 adapter" in str(error) and "partitioned" in str(error), error
else:
    raise AssertionError("told without all weights")
"""


@pytest.mark.parametrize("way", ["fsdp2", "zero3"])
def test_partitioned_weights_have_the_identity_of_whole_ones(tmp_path: Path, way: str) -> None:
    if way == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    script = tmp_path / "partitioned.py"
    script.write_text(_PARTITIONED.format(way=way))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)],
        capture_output=True, text=True, timeout=200, cwd=ROOT, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


# Directories with an adapter.


def trained_adapter(tmp_path: Path, config: Any = None) -> tuple[Path, Any]:
    """A directory with an adapter, and the model that it makes."""
    save_tiny_model(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = peft.get_peft_model(base, config or peft.LoraConfig(**_TARGET, r=2, lora_dropout=0.1))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    byte_tokenizer().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model.eval()


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_an_adapter_is_continued_merged_or_refused(tmp_path: Path, kind: str) -> None:
    path, model = trained_adapter(tmp_path, None if kind == "lora" else FRESH[kind]())
    ids = torch.arange(3, 20)[None]
    truth = model(ids).logits
    with pytest.raises(
        ValueError, match=r"holds an adapter \(.* adapter of .*base\), not a model.*'continue'.*'merge'"
    ):
        load_policy(str(path))
    with pytest.raises(ValueError, match="`adapter` must be one of"):
        load_policy(str(path), adapter="ignore")
    continued = load_policy(str(path), adapter="continue", dtype=torch.float32)
    torch.testing.assert_close(continued.eval()(ids).logits, truth)
    assert {name for name, p in continued.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }
    assert model_identity(continued) == model_identity(model)
    merged = load_policy(str(path), adapter="merge", dtype=torch.float32)
    assert not isinstance(merged, peft.PeftModel)
    torch.testing.assert_close(merged.eval()(ids).logits, truth, rtol=1e-4, atol=1e-4)
    assert load_policy(str(tmp_path / "base"), adapter="refuse").config.model_type == "llama"


def test_a_model_with_a_frozen_adapter_inside_is_no_start(tmp_path: Path) -> None:
    path, _ = trained_adapter(tmp_path)
    disguised = transformers.AutoModelForCausalLM.from_pretrained(path)
    for model in (str(path), disguised):
        with pytest.raises(ValueError, match=r"holds an adapter.*load_policy"):
            check_start(model)
    for model in (str(tmp_path / "base"), tiny_model(), load_policy(str(path), adapter="continue")):
        check_start(model)


@pytest.mark.parametrize("content", ["{broken", "[]", '{"peft_type": "LORA", "base_model_name_or_path": null}', "{}"])
def test_a_configuration_that_is_not_whole_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    for ask in (check_start, adapter_in, load_policy):
        with pytest.raises(ValueError, match=r"adapter_config.json: is no whole configuration of an adapter"):
            ask(str(tmp_path))


def test_a_learned_prompt_cannot_be_merged(tmp_path: Path) -> None:
    path, _ = trained_adapter(tmp_path, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="no weights to merge"):
        load_policy(str(path), adapter="merge")


def test_the_reference_of_a_directory_with_an_adapter_has_it_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, model = trained_adapter(tmp_path)
    data, output = write_pairs(tmp_path / "pairs.jsonl", 3), tmp_path / "r"
    command = ["--data", str(data), "--output", str(output), "--use_cpu"]
    assert run(["--model", str(path), *command]) == 0
    assert "with its adapter LORA" in capsys.readouterr().out
    table = ReferenceTable.read(output)
    assert table.header.adapter is not None
    for feature in preference_features(byte_tokenizer(), rows_of(tmp_path), 1024):
        truth = plain_logps(model, feature, feature["chosen_ids"])
        assert table.lookup(feature)["ref_chosen_logps"] == pytest.approx(truth, rel=1e-5)
    table.check_model(load_policy(str(path), adapter="continue"))
    with pytest.raises(ValueError, match=r"computed with the adapter LORA .*, and the model has none that is on"):
        table.check_model(tiny_model())
    with pytest.raises(ValueError, match="another model"):
        table.check_model(load_policy(str(path), adapter="merge"))
    assert run(["--model", str(tmp_path / "base"), *command, "--overwrite"]) == 0
    with pytest.raises(ValueError, match="computed without an adapter, and the model has LORA"):
        ReferenceTable.read(output).check_model(model)
    assert run(["--model", str(path), *command, "--adapter", "refuse"]) == 2
    assert "--adapter continue" in capsys.readouterr().err
    assert run(["--model", str(tmp_path / "base"), *command, "--adapter", "merge"]) == 2
    assert "holds no adapter" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["continue", "merge", "merge, then a new one"])
@pytest.mark.parametrize("from_file", [False, True])
def test_training_starts_from_the_model_with_its_adapter(tmp_path: Path, way: str, from_file: bool) -> None:
    path, model = trained_adapter(tmp_path)
    data, out, file = write_pairs(tmp_path / "pairs.jsonl", 4), tmp_path / "out", tmp_path / "r"
    adapter = ["--adapter", way.split(",")[0]]
    common = ["--model", str(path), "--data", str(data), "--use_cpu", *adapter]
    words = ["--output", str(out), "--steps", "1", "--lr", "1e-9", "--batch", "2", "--logging_steps", "1"]
    if way != "merge":
        words += ["--lora-rank", "2"]
    if from_file:
        assert run([*common, "--output", str(file)]) == 0
        words += ["--reference_logps", str(file)]
    assert cli.main(["train", *common, *words]) == 0
    saved = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(saved(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    state = json.loads((out / "trainer_state.json").read_text())
    first = next(entry for entry in state["log_history"] if "rewards/chosen" in entry)
    assert abs(first["rewards/chosen"]) < 1e-4
    assert abs(first["rewards/rejected"]) < 1e-4
