"""Packed batches say what padded ones say; references of packs; the HF Trainer; two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from infopo_kernels import InfoPOOptions, linear_infopo_loss  # noqa: E402
from infopo_kernels.integrations.collators import (  # noqa: E402
    PackedPreferenceCollator,
    PreferenceCollator,
    preference_features,
)
from infopo_kernels.integrations.preferences import PreferenceError  # noqa: E402
from infopo_kernels.integrations.step import (  # noqa: E402
    merged,
    metric_sums,
    metrics,
    reference_logps,
    rejected_half,
    split_inputs,
)
from infopo_kernels.integrations.trainer import PreferenceTrainer, compute_infopo_loss  # noqa: E402
from infopo_kernels.integrations.transformers import attach_linear_logps  # noqa: E402
from tests.training_fixtures import byte_tokenizer, tiny_model  # noqa: E402

LOSS_KEYS = ("is_chosen", "ref_logps")


def features(count: int = 3, references: bool = False) -> list[dict[str, Any]]:
    """Random tokens of odd lengths."""
    generator = torch.Generator().manual_seed(0)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, 259, (length,), generator=generator).tolist()

    made = [{"prompt_ids": ids(1, 9), "chosen_ids": ids(2, 12), "rejected_ids": ids(2, 12)} for _ in range(count)]
    if references:
        for index, feature in enumerate(made):
            feature |= {"ref_chosen_logps": -30.0 - index, "ref_rejected_logps": -40.0 - index}
    return made


def gradients(model: Any) -> dict[str, torch.Tensor]:
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


@pytest.mark.parametrize(
    ("architecture", "attention"),
    [("llama", "sdpa"), ("llama", "eager"), ("llama", "flex_attention"), ("gemma3_text", "sdpa"), ("gemma2", "eager")],
)
def test_packed_log_probabilities_and_gradients_are_the_padded_ones(architecture: str, attention: str) -> None:
    with torch.compiler.set_stance("force_eager"):  # transformers compiles flex attention, which takes a minute
        check_packed(architecture, attention)


def check_packed(architecture: str, attention: str) -> None:
    model = attach_linear_logps(tiny_model(architecture, attn_implementation=attention, hidden_size=64))
    batch = PreferenceCollator(pad_to_multiple_of=8)(features())
    assert batch["input_ids"].shape[1] % 8 == 0
    if attention == "flex_attention":  # which has no backward on a CPU
        model.requires_grad_(False)
    padded = model(**batch, linear_logps="sum").logps
    if padded.requires_grad:
        padded.mul(torch.arange(1, 7)).sum().backward()
    truth = gradients(model)
    assert len(truth) > 0 or attention == "flex_attention"

    collators = [PackedPreferenceCollator()]
    if attention == "sdpa" and architecture == "llama":  # gemma has layers with a window
        collators.append(PackedPreferenceCollator(share_prompt=True))
    for collator in collators:
        pack = {key: value for key, value in collator(features()).items() if key not in LOSS_KEYS}
        packed = model(**pack, linear_logps="sum").logps
        torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-4)
        if packed.requires_grad:
            packed.mul(torch.arange(1, 7)).sum().backward()
        for name, gradient in gradients(model).items():
            assert float((gradient - truth[name]).norm()) <= 1e-4 * float(truth[name].norm()) + 1e-5, name


def test_packs_hold_no_padding_and_shared_prompts_one_copy() -> None:
    made = features(4)
    lengths = [[len(f["prompt_ids"]), len(f["chosen_ids"]), len(f["rejected_ids"])] for f in made]
    pack = PackedPreferenceCollator(flash_attention_kwargs=True)(made)
    assert pack["input_ids"].shape == (1, sum(2 * p + c + r for p, c, r in lengths))
    assert pack["cu_seq_lens_q"].dtype == torch.int32
    assert pack["max_length_k"] == max(p + max(c, r) for p, c, r in lengths)
    shared = PackedPreferenceCollator(share_prompt=True)(made)
    assert shared["input_ids"].shape == (1, sum(p + c + r for p, c, r in lengths))
    assert len(shared["rows"]) == sum(c + r for _, c, r in lengths)
    with pytest.raises(ValueError, match="share_prompt"):
        PackedPreferenceCollator(share_prompt=True, flash_attention_kwargs=True)


def test_a_pair_without_prompt() -> None:
    model = attach_linear_logps(tiny_model())
    made = [{"prompt_ids": [], "chosen_ids": [5, 6, 7], "rejected_ids": [8, 9]}, *features(1)]
    truth = model(**PreferenceCollator()(made), linear_logps="sum").logps
    for share in (False, True):
        pack = {k: v for k, v in PackedPreferenceCollator(share_prompt=share)(made).items() if k not in LOSS_KEYS}
        torch.testing.assert_close(model(**pack, linear_logps="sum").logps, truth, rtol=1e-5, atol=1e-4)


def test_shared_prompts_need_an_attention_that_takes_the_mask() -> None:
    model = attach_linear_logps(tiny_model(attn_implementation="eager"))
    pack = PackedPreferenceCollator(share_prompt=True)(features())
    with pytest.raises(ValueError, match="sdpa"):
        model(**pack, infopo=InfoPOOptions())
    windowed = attach_linear_logps(tiny_model("gemma3_text", attn_implementation="sdpa"))
    with pytest.raises(ValueError, match="window"):
        windowed(**pack, infopo=InfoPOOptions())


def test_what_the_cut_leaves_without_a_response_is_named() -> None:
    with pytest.raises(ValueError, match=r"The chosen response of pair 0 .* max_length = 1"):
        PreferenceCollator(max_length=1)(features())
    several = {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [[7], [8]], "rejected_mask": [[1], [0]]}
    with pytest.raises(ValueError, match="Rejected response 1 of pair 3 of the batch has no token to score; drop"):
        PackedPreferenceCollator()([*features(), several])


def unequal() -> list[dict[str, Any]]:
    """Pairs with one, two and three rejected responses, weights, masks and references."""
    generator = torch.Generator().manual_seed(5)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 259, (length,), generator=generator).tolist()

    return [
        {
            "prompt_ids": ids(4), "chosen_ids": ids(5), "rejected_ids": [ids(3), ids(6)], "weight": 0.5,
            "chosen_mask": [1, 0, 0, 1, 1], "rejected_mask": [[0, 1, 1], [1, 1, 1, 0, 0, 1]],
            "ref_chosen_logps": -20.0, "ref_rejected_logps": [-11.0, -31.0],
        },
        {
            "prompt_ids": [], "chosen_ids": ids(4), "rejected_ids": ids(7),
            "ref_chosen_logps": None, "ref_rejected_logps": -30.0,
        },
        {
            "prompt_ids": ids(2), "chosen_ids": ids(3), "rejected_ids": [ids(2), ids(2), ids(5)], "weight": 3.0,
            "ref_chosen_logps": -12.0, "ref_rejected_logps": [-9.0, -8.0, -21.0],
        },
    ]  # fmt: skip


def plain_logps(model: Any, prompt: list[int], response: list[int], mask: list[int] | None) -> torch.Tensor:
    """A sequence's log-probability from the model's own logits, in float64."""
    ids = torch.tensor([prompt + response])
    logps = model(ids).logits[0, :-1].double().log_softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for k, token in enumerate(response):
        row = len(prompt) + k - 1
        if row >= 0 and (mask is None or mask[k]):
            total = total + logps[row, token]
    return total


@pytest.mark.parametrize("layout", ["padded", "packed", "shared-prompt"])
def test_several_rejected_weights_and_masks_against_a_plain_loop(layout: str) -> None:
    made = unequal()
    collator: Any = (
        PreferenceCollator() if layout == "padded" else PackedPreferenceCollator(share_prompt=layout != "packed")
    )
    batch = collator(made)
    own = {"is_chosen", "ref_logps", "sequence_weights", "num_pairs", "num_rejected"}
    model = attach_linear_logps(tiny_model(attn_implementation="sdpa"))
    logps = model(**{key: value for key, value in batch.items() if key not in own}, linear_logps="sum").logps

    # All chosen, then all rejected, prompt by prompt.
    plain = tiny_model(attn_implementation="sdpa")
    chosen = [plain_logps(plain, f["prompt_ids"], f["chosen_ids"], f.get("chosen_mask")) for f in made]
    rejected = []
    for f in made:
        several = isinstance(f["rejected_ids"][0], list)
        masks = f.get("rejected_mask") or [None] * 3
        responses = f["rejected_ids"] if several else [f["rejected_ids"]]
        rejected.append([plain_logps(plain, f["prompt_ids"], r, m) for r, m in zip(responses, masks, strict=False)])
    truth = torch.stack([*chosen, *(each for of_prompt in rejected for each in of_prompt)])
    torch.testing.assert_close(logps, truth, rtol=1e-5, atol=1e-4)
    assert batch["is_chosen"].tolist() == [True] * 3 + [False] * 6
    assert batch["ref_logps"].isnan().tolist() == [False, True] + [False] * 7

    # A prompt counts with its weight, whatever the number of its rejected responses.
    beta, offset = 0.1, 1.0
    reference = batch["ref_logps"].nan_to_num(0.0)
    reward = beta * (logps - reference)
    terms = torch.where(batch["is_chosen"], -reward, (reward - offset).exp())
    loss = (batch["sequence_weights"] * terms).sum() / batch["num_pairs"]
    expected = torch.zeros((), dtype=torch.float64)
    for index, f in enumerate(made):
        refs = f["ref_rejected_logps"] if isinstance(f["ref_rejected_logps"], list) else [f["ref_rejected_logps"]]
        ours = -beta * (chosen[index] - (f["ref_chosen_logps"] or 0.0))
        others = [(beta * (logp - ref) - offset).exp() for logp, ref in zip(rejected[index], refs, strict=True)]
        expected = expected + f.get("weight", 1.0) * (ours + torch.stack(others).mean())
    torch.testing.assert_close(loss, expected / 3, rtol=1e-5, atol=1e-5)
    assert batch["num_pairs"] == 3.0

    loss.backward()
    (expected / 3).backward()
    truths = gradients(plain)
    for name, gradient in gradients(model).items():
        assert float((gradient - truths[name]).norm()) <= 1e-3 * float(truths[name].norm()) + 1e-6, name


@pytest.mark.parametrize("packed", [False, True])
def test_batches_without_weights_hold_what_they_held(packed: bool) -> None:
    batch = (PackedPreferenceCollator() if packed else PreferenceCollator())(features())
    layout = {"input_ids", "position_ids", "labels", "cu_seqlens", "is_chosen", "rejected_start"}
    assert batch.keys() == (layout if packed else {"input_ids", "attention_mask", "labels"})


def test_a_cut_reaches_every_response_and_mask() -> None:
    batch = PreferenceCollator(max_length=7)(unequal())
    assert batch["input_ids"].shape == (9, 7)
    row = batch["labels"][0]
    assert (row != -100).tolist() == [False] * 4 + [True, False, False]


@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize("several", [False, True])
def test_tables_in_other_formats_give_the_same_batches(kind: str, several: bool) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [
        {"prompt_ids": [3, 4], "chosen_ids": [5, 6 + n], "rejected_ids": [[7], [8, 9]] if several else [7, 8],
         "chosen_mask": [n, 1], "weight": 1.5, "ref_chosen_logps": -3.0,
         "ref_rejected_logps": [-1.0, -2.0] if several else -1.0}
        for n in (0, 1)
    ]  # fmt: skip
    table = datasets.Dataset.from_list(rows).with_format(kind)
    for collator in (PreferenceCollator(4), PackedPreferenceCollator()):
        ours, truth = collator([table[0], table[1]]), collator(rows)
        assert ours.keys() == truth.keys()
        for name, value in truth.items():
            torch.testing.assert_close(ours[name], value)


@pytest.mark.parametrize(
    "row", [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt_ids": [3], "chosen_ids": [4]}]
)
def test_rows_that_are_no_features_are_named(row: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"Pair 0 of the batch has no `(prompt|rejected)_ids` \(found: prompt.*features"
    ):
        PreferenceCollator()([row])


@pytest.mark.parametrize("collator", [PreferenceCollator(), PackedPreferenceCollator(share_prompt=True)])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weight": 0.0}, "`weight` of pair 1 .* above 0, got 0.0"),
        ({"weight": -1.0}, "`weight` of pair 1 .* above 0, got -1.0"),
        ({"chosen_mask": [1]}, r"`chosen_mask` of pair 1 .*\[2\]\), got \[1\]"),
        ({"rejected_mask": [[1, 1]]}, r"`rejected_mask` of pair 1 .*\[2, 1\]\), got \[2\]"),
        ({"rejected_mask": [[1, 1], [1, 1]]}, r"`rejected_mask` of pair 1 .*got \[2, 2\]"),
        ({"ref_rejected_logps": -3.0}, "`ref_rejected_logps` of pair 1 .* a list of 2, .* got -3.0"),
        ({"ref_rejected_logps": [-3.0]}, r"`ref_rejected_logps` of pair 1 .* a list of 2, .* got \[-3.0\]"),
    ],
)
def test_what_does_not_fit_in_a_feature_is_named(collator: Any, wrong: dict[str, Any], message: str) -> None:
    good = {"prompt_ids": [3, 4], "chosen_ids": [5, 6], "rejected_ids": [[7, 8], [9]]}
    assert len(collator([good, good])["is_chosen"]) == 6
    with pytest.raises(ValueError, match=message):
        collator([good, good | wrong])


def test_features_of_rows_and_what_is_wrong_with_them() -> None:
    tokenizer = byte_tokenizer()
    rows = [{"prompt": "2+2=", "chosen": "4", "rejected": "5"}]
    (feature,) = preference_features(tokenizer, rows)
    assert tokenizer.decode(feature["prompt_ids"] + feature["chosen_ids"]) == "2+2=4<|end|>"
    with pytest.raises(PreferenceError, match=r"^row 0, field `rejected`: is missing"):
        preference_features(tokenizer, [{"prompt": "a", "chosen": "b"}])


@pytest.mark.parametrize("packed", [False, True])
def test_the_rejected_half_alone(packed: bool) -> None:
    model = attach_linear_logps(tiny_model())
    collator = PackedPreferenceCollator() if packed else PreferenceCollator()
    inputs, known = split_inputs(collator(features(references=True)))
    assert known["ref_logps"].tolist() == [-30.0, -31.0, -32.0, -40.0, -41.0, -42.0]
    whole = reference_logps(model, inputs, average=True, skip_chosen=False)
    half = reference_logps(model, inputs, average=True, skip_chosen=True)
    assert half[:3].isnan().all()
    torch.testing.assert_close(half[3:], whole[3:], rtol=1e-6, atol=1e-5)
    assert rejected_half(inputs, 3)["labels"].numel() < inputs["labels"].numel()


def test_a_batch_of_another_collator_is_explained() -> None:
    with pytest.raises(ValueError, match="remove_unused_columns"):
        split_inputs({"input_ids": torch.zeros(2, 3)})


def test_metrics_against_their_definition() -> None:
    hidden, weight = torch.randn(6, 5, 8), torch.randn(11, 8)
    options = InfoPOOptions(beta=0.5, max_log_weight=0.5)
    labels = torch.randint(0, 11, (6, 5))
    ref_logps = torch.randn(6, dtype=torch.float64) * 4 - 14
    output = linear_infopo_loss(hidden, weight, labels, ref_logps=ref_logps, **vars(options))
    # Two processes: metrics are of all pairs.
    sums = torch.stack([metric_sums(output, options), metric_sums(output, options)])
    values = metrics(sums)
    reward = 0.5 * (output.logps - ref_logps)
    weights = 0.5 * torch.exp((reward[3:] - 1).clamp(max=0.5))
    expected = {
        "rewards/chosen": reward[:3].mean(), "rewards/margins": (reward[:3] - reward[3:]).mean(),
        "rewards/accuracies": (reward[:3] > reward[3:]).double().mean(), "logps/rejected": output.logps[3:].mean(),
        "mi_lower_bound": -output.loss, "rejected_weight/mean": weights.mean(), "rejected_weight/max": weights.max(),
        "rejected_weight/capped": (reward[3:] - 1 > 0.5).double().mean(), "scored_tokens": torch.tensor(60.0),
    }  # fmt: skip
    for name, value in expected.items():
        assert values[name] == pytest.approx(float(value), rel=1e-5), name


def test_metrics_of_the_tail_against_their_definition() -> None:
    hidden, weight = torch.randn(6, 5, 8, requires_grad=True), 6 * torch.randn(600, 8)
    labels = torch.randint(0, 600, (6, 5))

    def output(threshold: float, **options: Any) -> Any:
        return linear_infopo_loss(hidden, weight, labels, backend="torch", tail_threshold=threshold, **options)

    few, many, exact = output(1e-6, report_tail=True), output(0.05, report_tail=True), output(0.05)
    sums = torch.stack([metric_sums(each, InfoPOOptions()) for each in (few, exact, many)])
    for values in (metrics(sums), metrics(merged(sums)[None])):
        assert values["tail/mass_mean"] == pytest.approx(float(few.tail.mass_mean + many.tail.mass_mean) / 2)
        assert values["tail/kept_share"] == pytest.approx(float(few.tail.kept_share + many.tail.kept_share) / 2)
        assert values["tail/mass_max"] == float(many.tail.mass_max) > float(few.tail.mass_max)
    assert not [name for name in metrics(sums[1:2]) if name.startswith("tail/")]


class Visited(torch.utils.data.Dataset):
    """A dataset that notes the order in which it is read."""

    def __init__(self, made: list[dict[str, Any]]) -> None:
        self.made = made
        self.order: list[int] = []

    def __len__(self) -> int:
        return len(self.made)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.order.append(index)
        return self.made[index]


def arguments(output: Path, **overrides: Any) -> Any:
    settings = {
        "output_dir": str(output), "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "logging_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    return transformers.TrainingArguments(**{**settings, **overrides})


@pytest.mark.parametrize("packed", [False, True])
def test_hf_trainer_takes_the_steps_of_a_plain_loop(tmp_path: Path, packed: bool) -> None:
    made, options = features(12), InfoPOOptions(beta=0.1)
    collator = PackedPreferenceCollator() if packed else PreferenceCollator()
    model = tiny_model()
    visited = Visited(made)
    trainer = PreferenceTrainer(
        model, arguments(tmp_path, gradient_accumulation_steps=2), train_dataset=visited, eval_dataset=made[:4],
        data_collator=collator, infopo=options, ref_model=tiny_model(),
    )  # fmt: skip
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    assert "rejected_weight/mean" in logged[0]
    assert "eval_mi_lower_bound" in trainer.evaluate()

    # The same steps, written out on logits.
    plain, reference = tiny_model(), tiny_model()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)

    def logps(module: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = module(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
        labels = batch["labels"][:, 1:]
        token = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        return (token * (labels != -100)).sum(-1)

    losses = []
    for start in range(0, 12, 4):
        batch = PreferenceCollator()([made[i] for i in visited.order[start : start + 4]])
        with torch.no_grad():
            ref = logps(reference, batch)
        chosen, rejected = (0.1 * (logps(plain, batch) - ref)).chunk(2)
        loss = (-chosen + torch.exp(rejected - 1)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert [entry["loss"] for entry in logged] == pytest.approx(losses, rel=1e-3, abs=2e-3)


def test_compute_loss_reads_the_reference_from_the_batch_or_the_adapter() -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
    model = attach_linear_logps(peft.get_peft_model(tiny_model(), lora))
    inputs = PreferenceCollator()(features())
    with model.disable_adapter():
        reference = model(**inputs, linear_logps="sum").logps.detach()
    by_adapter = compute_infopo_loss(model, inputs)
    by_batch = compute_infopo_loss(model, {**inputs, "ref_logps": reference})
    torch.testing.assert_close(by_adapter.loss, by_batch.loss)
    torch.testing.assert_close(by_adapter.infopo.ref_logps, reference)
    assert (by_adapter.infopo.logps - reference).abs().min() > 0  # the adapter is on again
    skipped = compute_infopo_loss(model, inputs, skip_chosen_reference=True)
    assert skipped.infopo.mi_lower_bound.isnan()


_DISTRIBUTED = """
import sys, torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, {root!r})
from infopo_kernels import InfoPOOptions
from infopo_kernels.integrations.collators import PackedPreferenceCollator, PreferenceCollator
from infopo_kernels.integrations.trainer import compute_infopo_loss
from infopo_kernels.integrations.transformers import attach_linear_logps
from tests.test_integrations_packing import features
from tests.training_fixtures import tiny_model

dist.init_process_group("gloo")
rank = dist.get_rank()
model = attach_linear_logps(tiny_model(tie_word_embeddings={way!r} == "ddp"))
if {way!r} == "ddp":
    model = DistributedDataParallel(model)
else:
    for unit in (*model.model.layers, *([model.lm_head] if {way!r} == "fsdp2-head" else []), model):
        fully_shard(unit)
made = features(4, references=True)[2 * rank : 2 * rank + 2]
collator = PackedPreferenceCollator() if rank else PreferenceCollator()  # layouts may differ between ranks
out = compute_infopo_loss(model, collator(made), InfoPOOptions(sft_weight=0.5))
out.loss.backward()
# log-probabilities with a gradient need the head's weight again in the backward pass
inputs = PackedPreferenceCollator()(made)
logps = model(**{{k: v for k, v in inputs.items() if k not in ("is_chosen", "ref_logps")}}, linear_logps="mean").logps
logps.sum().backward()
grads = {{name.removeprefix("module."): p.grad for name, p in model.named_parameters()}}
grads = {{name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}}
if rank == 0:
    torch.save(grads, {path!r})
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "fsdp2-head"])
def test_two_processes_have_the_gradients_of_one(tmp_path: Path, way: str) -> None:
    path, script = tmp_path / "gradients.pt", tmp_path / "ddp.py"
    root = str(Path(__file__).parents[1])
    script.write_text(_DISTRIBUTED.format(root=root, path=str(path), way=way))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=root, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    model = attach_linear_logps(tiny_model(tie_word_embeddings=way == "ddp"))
    inputs = PreferenceCollator()(features(4, references=True))
    compute_infopo_loss(model, inputs, InfoPOOptions(sft_weight=0.5)).loss.backward()
    (model(**split_inputs(inputs)[0], linear_logps="mean").logps.sum() / 2).backward()  # gradients are averaged
    truth, found = gradients(model), torch.load(path)
    assert truth.keys() == found.keys()
    for name, expected in truth.items():
        assert float((found[name] - expected).norm()) <= 1e-4 * float(expected.norm()) + 1e-7, name
