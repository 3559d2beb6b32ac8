"""attach_linear_logps: log-probabilities and gradients are those of the model's own logits, for every family."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from infopo_kernels import DPO, IPO, SFT, InfoPOOptions, KernelOptions, LogitOptions, SimPO  # noqa: E402
from infopo_kernels.integrations.logit_transform import logit_options  # noqa: E402
from infopo_kernels.integrations.sealed import Sealed  # noqa: E402
from infopo_kernels.integrations.trainer import compute_infopo_loss  # noqa: E402
from infopo_kernels.integrations.transformers import (  # noqa: E402
    attach_linear_logps,
    causal_model,
    detach_linear_logps,
    is_attached,
)
from infopo_kernels.libraries import TESTED  # noqa: E402

V = 97
_TINY = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_MOE = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5}
_VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 3.0},
    "gemma3_text": {},
    "mistral": {},
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0},
    "hyperclovax": {"logits_scaling": 3.0},
    "recurrent_gemma": {"logits_soft_cap": 3.0, "lru_width": 32},
    "nanochat": {"final_logit_softcapping": 3.0},
    "falcon_h1": {
        "lm_head_multiplier": 0.3, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1,
        "mamba_d_state": 8,
    },
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 32},
    "phi": {},
    "mixtral": {"num_local_experts": 4, **_MOE},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, **_MOE},
}  # fmt: skip


def tiny(kind: str, seed: int = 0, **overrides: Any) -> Any:
    torch.manual_seed(seed)
    known = kind in transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if not known and transformers.__version__.split(".")[:2] != TESTED["transformers"][1].split(".")[:2]:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    settings = {**_TINY, **FAMILIES.get(kind, {}), **overrides}
    if kind in ("gpt2", "opt"):
        settings = {key: value for key, value in settings.items() if key not in ("head_dim", "num_key_value_heads")}
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # biases start at zero, where a forgotten one would not show
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    return model


def batch(vocabulary: int = V, T: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (4, T), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, T - 3 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def own_logps(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Token log-probabilities [S, T - 1] from the model's own logits, and its auxiliary loss."""
    out = model(**{key: value for key, value in inputs.items() if key != "labels"}, use_cache=False)
    labels = inputs["labels"][:, 1:]
    logps = out.logits[:, :-1].float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return logps * (labels != -100), getattr(out, "aux_loss", None)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def assert_same_gradients(ours: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert ours.keys() == truth.keys()
    largest = max(float(g.abs().max()) for g in truth.values())
    for name, expected in truth.items():
        # A gradient that is zero in exact arithmetic (of a key's bias) holds rounding only, hence the second term.
        allowed = tolerance * float(expected.abs().max()) + 1e-6 * largest
        assert float((ours[name] - expected).abs().max()) <= allowed, name


@pytest.mark.parametrize("kind", FAMILIES)
def test_logps_and_gradients_are_those_of_the_models_own_logits(kind: str) -> None:
    model, inputs = tiny(kind), batch()
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    tokens, aux = own_logps(model, inputs)
    own_loss = (tokens.double().sum(-1) * weights).sum() + (0 if aux is None else aux)
    own_loss.backward()
    truth = gradients(model)

    attach_linear_logps(model)
    out = model(**inputs, linear_logps="sum")
    ((out.logps * weights).sum() + (0 if aux is None else out.aux_loss)).backward()
    torch.testing.assert_close(out.logps, tokens.double().sum(-1), rtol=1e-6, atol=1e-5)
    assert_same_gradients(gradients(model), truth)
    assert (out.aux_loss is None) == (aux is None)

    with torch.no_grad():
        each = model(**inputs, linear_logps="none").logps
    torch.testing.assert_close(each[:, :-1], tokens.detach(), rtol=1e-5, atol=1e-5)
    assert (each[:, -1] == 0).all()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mixtral"])
def test_infopo_loss_and_gradients(kind: str) -> None:
    model, inputs = tiny(kind), batch()
    options = InfoPOOptions(beta=0.5, sft_weight=0.3)
    ref_logps = torch.tensor([-30.0, -25.0, -29.0, -31.0], dtype=torch.float64)
    tokens, aux = own_logps(model, inputs)
    sums, counts = tokens.double().sum(-1), (inputs["labels"][:, 1:] != -100).sum(-1)
    reward = 0.5 * (sums - ref_logps)
    loss = (-reward[:2] + torch.exp(reward[2:] - 1)).mean() - 0.3 * (sums / counts)[:2].mean()
    (loss + (0 if aux is None else 0.5 * aux)).backward()
    truth = gradients(model)

    out = attach_linear_logps(model)(**inputs, infopo=options, ref_logps=ref_logps)
    out.loss.backward()
    assert_same_gradients(gradients(model), truth, 5e-5)
    torch.testing.assert_close(out.infopo.loss.double(), loss.detach(), rtol=1e-5, atol=1e-5)
    expected = loss.detach() + (0 if aux is None else 0.5 * aux.detach())
    torch.testing.assert_close(out.loss.double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_generation_and_ordinary_forward_stay_and_detach_restores() -> None:
    model, inputs = tiny("llama"), batch()
    head = model.lm_head
    before = model(**inputs)
    tokens = model.generate(inputs["input_ids"][:, :4], max_new_tokens=4, do_sample=False)
    attach_linear_logps(model)
    assert is_attached(model)
    after = model(**inputs)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)
    assert torch.equal(tokens, model.generate(inputs["input_ids"][:, :4], max_new_tokens=4, do_sample=False))
    names = list(model.state_dict())
    assert model.lm_head is head
    detach_linear_logps(model)
    assert not is_attached(model)
    assert type(head) is nn.Linear
    assert "forward" not in model.__dict__
    assert list(model.state_dict()) == names
    with pytest.raises(ValueError, match="Nothing is attached"):
        detach_linear_logps(model)


def test_a_copy_is_a_model_of_its_own() -> None:
    model, inputs = attach_linear_logps(tiny("qwen3")), batch()
    other = copy.deepcopy(model)
    with torch.no_grad():
        before = model(**inputs, linear_logps="sum").logps
        for parameter in other.parameters():
            parameter.add_(0.1)
        assert torch.equal(before, model(**inputs, linear_logps="sum").logps)
        truth = own_logps(other, inputs)[0].sum(-1)
        torch.testing.assert_close(other(**inputs, linear_logps="sum").logps.float(), truth, rtol=1e-5, atol=1e-5)
    assert other.lm_head.weight is other.model.embed_tokens.weight  # still tied


def test_bfloat16_keeps_float32_logits() -> None:
    model, inputs = tiny("gemma2").to(torch.bfloat16), batch()
    hidden = model.model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    logits = 3.0 * torch.tanh(hidden.double() @ model.lm_head.weight.double().T / 3.0)
    labels = inputs["labels"][:, 1:]
    truth = logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1) * (labels != -100)
    attach_linear_logps(model)
    with torch.no_grad():
        out = model(**inputs, linear_logps="sum")
    torch.testing.assert_close(out.logps, truth.sum(-1), rtol=1e-6, atol=1e-4)


def test_autocast_and_kernel_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the interpreter, which other tests use, stands in for a GPU
    model, inputs = tiny("llama"), batch()
    attach_linear_logps(model, kernel=KernelOptions("torch"))
    with torch.autocast("cpu", torch.bfloat16):
        model(**inputs, infopo=InfoPOOptions(), ref_logps=torch.full((4,), -30.0)).loss.backward()
    assert model.lm_head.weight.grad.dtype == torch.float32
    attach_linear_logps(model, kernel=KernelOptions("triton"))
    with pytest.raises(ValueError, match="triton"):
        model(**inputs, linear_logps="sum")


def test_temperature_goes_on_top() -> None:
    model, inputs = tiny("cohere"), batch()
    labels = inputs["labels"][:, 1:]
    with torch.no_grad():
        own = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1] / 0.7
        truth = own.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1) * (labels != -100)
        attach_linear_logps(model, logit=LogitOptions(logit_scale=0.25, temperature=0.7))
        torch.testing.assert_close(model(**inputs, linear_logps="sum").logps.float(), truth.sum(-1))


class _Odd(transformers.LlamaForCausalLM):  # type: ignore[misc, name-defined]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        if self.config.odd == "mask":
            out.logits[..., 5] = torch.finfo(out.logits.dtype).min
        elif self.config.odd == "scale":
            out.logits = out.logits * 1.01
        elif self.config.odd == "twice":
            self.lm_head(out.logits.new_zeros(1, self.config.hidden_size))
        return out


@pytest.mark.parametrize(
    ("odd", "message"), [("mask", "1 of 97 vocabulary"), ("scale", "LogitOptions"), ("twice", "2 times")]
)
def test_what_is_not_known_of_a_model_is_refused(odd: str, message: str) -> None:
    torch.manual_seed(0)
    model = attach_linear_logps(_Odd(transformers.LlamaConfig(**_TINY, odd=odd)))
    with pytest.raises(ValueError, match=message):
        model(**batch(), linear_logps="sum")
    if odd == "scale":
        attach_linear_logps(model, logit=LogitOptions(logit_scale=1.01))
        torch.testing.assert_close(
            model(**batch(), linear_logps="sum").logps.float(), own_logps(model, batch())[0].sum(-1)
        )


def test_every_refusal_names_reason_and_way_out() -> None:
    model = tiny("llama")
    model.lm_head = nn.Sequential(nn.Linear(32, V))
    with pytest.raises(TypeError, match="not a plain"):
        attach_linear_logps(model)
    quantised = tiny("llama")
    quantised.lm_head = torch.ao.nn.quantized.dynamic.Linear(32, V)
    with pytest.raises(TypeError, match=r"quantised.*modules_to_not_convert"):
        attach_linear_logps(quantised)
    config = transformers.T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="encoder-decoder"):
        attach_linear_logps(transformers.T5ForConditionalGeneration(config))
    attached = attach_linear_logps(tiny("llama"))
    inputs = batch()
    labels = inputs.pop("labels")
    with pytest.raises(TypeError, match="`labels` is missing"):
        attached(**inputs, linear_logps="sum")
    with pytest.raises(TypeError, match="both given"):
        attached(**inputs, labels=labels, linear_logps="sum", infopo=InfoPOOptions())
    with pytest.raises(TypeError, match="`ref_logps` was given without"):
        attached(**inputs, labels=labels, ref_logps=torch.zeros(4))
    with pytest.raises(TypeError, match="InfoPOOptions"):
        attached(**inputs, labels=labels, infopo=0.1)
    with pytest.raises(ValueError, match="`reduction`"):
        attached(**inputs, labels=labels, linear_logps="average")
    assert not attached.lm_head._handed_over  # an error leaves an ordinary model behind
    assert attached(**inputs).logits.shape == (4, 12, V)


def attached_with_adapter(model: Any, config: Any, first: str) -> Any:
    """The model with both, in either order."""
    peft = pytest.importorskip("peft")
    if first == "attach":
        return peft.get_peft_model(attach_linear_logps(model), config)
    return attach_linear_logps(peft.get_peft_model(model, config))


@pytest.mark.parametrize("first", ["attach", "adapter"])
def test_lora(first: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    model, inputs = tiny("llama"), batch()
    model = attached_with_adapter(model, config, first)
    own_logps(model, inputs)[0].sum().backward()
    truth = gradients(model)
    model(**inputs, linear_logps="none").logps.sum().backward()
    assert_same_gradients(gradients(model), truth)
    assert all("lora" in name for name in truth)
    with model.disable_adapter(), torch.no_grad():
        reference = model(**inputs, linear_logps="sum").logps
        torch.testing.assert_close(reference.float(), own_logps(model, inputs)[0].sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", ["attach", "adapter"])
def test_an_adapter_on_the_head_is_refused_and_a_trained_copy_served(first: str) -> None:
    peft = pytest.importorskip("peft")
    on_head = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "lm_head"])
    model, inputs = tiny("llama"), batch()
    with pytest.raises(TypeError, match=r"carries an adapter.*modules_to_save"):
        attached_with_adapter(model, on_head, first)(**inputs, linear_logps="sum")

    saved = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = tiny("llama")
    model = attached_with_adapter(model, saved, first)
    own_logps(model, inputs)[0].sum().backward()
    truth = gradients(model)
    model(**inputs, linear_logps="none").logps.sum().backward()
    assert_same_gradients(gradients(model), truth)
    assert any("modules_to_save" in name for name in truth)


def test_text_model_of_a_vision_language_wrapper() -> None:
    torch.manual_seed(0)
    text = {key: value for key, value in _TINY.items() if not key.endswith("_id")}
    config = transformers.Gemma3Config(
        text_config={**text, "final_logit_softcapping": 3.0, "vocab_size": V + 10},
        vision_config={**_VISION, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4, image_token_index=V, boi_token_index=V + 1, eoi_token_index=V + 2,
    )  # fmt: skip
    assert logit_options(config).softcap == 3.0
    model, inputs = transformers.Gemma3ForConditionalGeneration(config).eval(), batch()
    ids = inputs["input_ids"]
    ids[:, 1:5], inputs["labels"][:, :5] = V, -100
    inputs |= {"pixel_values": torch.randn(4, 3, 16, 16), "token_type_ids": (ids == V).long()}
    own_logps(model, inputs)[0].sum().backward()
    truth = gradients(model)
    attach_linear_logps(model)  # the wrapper, unlike the text model alone, does not apply the softcap
    model(**inputs, linear_logps="none").logps.sum().backward()
    assert any("vision" in name for name in truth)
    assert_same_gradients(gradients(model), truth)


def test_gradient_checkpointing_and_accumulation() -> None:
    model, inputs = tiny("llama").train(), batch()
    own_logps(model, inputs)[0].sum().mul(2).backward()
    truth = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    attach_linear_logps(model)
    for _ in range(2):
        model(**inputs, linear_logps="none").logps.sum().backward()
    assert_same_gradients(gradients(model), truth)


def test_compiled_without_a_graph_break() -> None:
    model, inputs = attach_linear_logps(tiny("llama")), batch()
    options = {"infopo": InfoPOOptions(beta=0.01)}
    eager = model(**inputs, **options).loss
    eager.backward()
    truth = gradients(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs, **options).loss
    compiled.backward()
    torch.testing.assert_close(compiled, eager)
    assert_same_gradients(gradients(model), truth)


def lost_and_explained(model: Any, inputs: dict[str, Tensor]) -> None:
    assert not is_attached(model)
    with pytest.raises(RuntimeError, match=r"attach_linear_logps\(model\) again"):
        compute_infopo_loss(model, inputs, reference_free=True)
    attach_linear_logps(model)
    assert is_attached(model)
    expected = own_logps(model, inputs)[0].double().sum(-1)
    torch.testing.assert_close(compute_infopo_loss(model, inputs, reference_free=True).infopo.logps, expected.detach())


def test_a_forward_that_was_replaced_is_noticed_and_attached_again() -> None:
    model, inputs = attach_linear_logps(tiny("llama")), batch()
    model.forward = functools.partial(type(model).forward, model)  # as Liger's patch of an instance does
    lost_and_explained(model, inputs)
    other = attach_linear_logps(tiny("gpt2"))
    del other.forward  # a copy that left the instance's attributes behind
    lost_and_explained(other, inputs)
    with pytest.raises(RuntimeError, match="before the model is wrapped"):
        compute_infopo_loss(tiny("llama"), inputs, reference_free=True)


def test_what_is_returned_is_looked_at_too() -> None:
    model, inputs = attach_linear_logps(tiny("llama")), batch()
    ours = model.forward

    @functools.wraps(ours)
    def deaf(*args: Any, infopo: Any = None, objective: Any = None, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    model.forward = deaf
    assert is_attached(model)  # it does run
    with pytest.raises(RuntimeError, match="CausalLMOutputWithPast"):
        compute_infopo_loss(model, inputs, reference_free=True)


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "accelerate", "compile"])
def test_copies_and_wrappers_stay_attached(how: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, inputs = attach_linear_logps(tiny("qwen3")), batch()
    truth = own_logps(model, inputs)[0].double().sum(-1).detach()
    if how == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif how == "deepcopy":
        model = copy.deepcopy(model)
    elif how == "compile":
        model = torch.compile(model, backend="eager")
    else:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # of what ran before in this process
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        model = accelerator.prepare(model)
        assert is_attached(model)
        model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert is_attached(model)
    torch.testing.assert_close(compute_infopo_loss(model, inputs, reference_free=True).infopo.logps, truth)
    causal = causal_model(model)
    assert "input_ids" in inspect.signature(causal.forward).parameters
    if how != "compile":
        detach_linear_logps(model)
        assert not is_attached(model)
        assert torch.equal(model(**inputs).logits, causal(**inputs).logits)


def test_a_patched_head_is_refused() -> None:
    model = attach_linear_logps(tiny("llama"))
    model.lm_head.forward = lambda x: torch.nn.functional.linear(x, model.lm_head.weight)
    with pytest.raises(TypeError, match="forward of another library"):
        model(**batch(), linear_logps="sum")


def test_two_attached_models_share_nothing() -> None:
    llama, gpt2, again = tiny("llama"), tiny("gpt2"), tiny("llama", seed=1)
    for model in (llama, gpt2, again):
        attach_linear_logps(model)
    assert "encoder_hidden_states" in inspect.signature(gpt2.forward).parameters
    assert "encoder_hidden_states" not in inspect.signature(llama.forward).parameters
    llama.generate(batch()["input_ids"][:, :4], max_new_tokens=2, do_sample=False)
    detach_linear_logps(gpt2)
    assert is_attached(llama)
    assert is_attached(again)
    for model in (llama, again):
        expected = own_logps(model, batch())[0].sum(-1)
        torch.testing.assert_close(model(**batch(), linear_logps="sum").logps.float(), expected)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_resized_embeddings_are_served(kind: str) -> None:
    model, inputs = attach_linear_logps(tiny(kind)), batch()
    model(**inputs, linear_logps="sum")
    model.resize_token_embeddings(V + 7)
    inputs["labels"][0, 5] = inputs["input_ids"][0, 5] = V + 3
    expected = own_logps(model, inputs)[0].sum(-1)
    torch.testing.assert_close(model(**inputs, linear_logps="sum").logps.float(), expected)
    head = nn.Linear(32, V + 7, bias=False)
    model.set_output_embeddings(head)
    torch.testing.assert_close(model(**inputs, linear_logps="sum").logps.float(), own_logps(model, inputs)[0].sum(-1))


@pytest.mark.parametrize("tokens", [[5, 6], {"lm_head": [7], "embed_tokens": [5, 6]}], ids=["list", "dict"])
@pytest.mark.parametrize("tied", [True, False])
def test_trainable_tokens(tokens: Any, tied: bool) -> None:
    peft = pytest.importorskip("peft")
    if tied and isinstance(tokens, dict):
        pytest.skip("one of two tied modules cannot be trained alone")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], trainable_token_indices=tokens)
    model = peft.get_peft_model(tiny("llama", tie_word_embeddings=tied), config)
    inputs = batch()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(0.3)
    own_logps(model, inputs)[0].sum().backward()
    truth = gradients(model)
    attach_linear_logps(model)
    out = model(**inputs, linear_logps="none").logps.sum()
    out.backward()
    assert any("trainable_tokens" in name for name in truth)
    assert_same_gradients(gradients(model), truth)
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(
            model(**inputs, linear_logps="sum").logps.float(), own_logps(model, inputs)[0].sum(-1)
        )


@pytest.mark.parametrize("first", ["attach", "adapter"])
def test_mixed_adapters(first: str) -> None:
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    if first == "attach":
        attach_linear_logps(model)
    mixed = peft.get_peft_model(model, peft.LoHaConfig(r=2, target_modules=["q_proj"]), mixed=True).eval()
    if first == "adapter":
        attach_linear_logps(mixed)
    assert is_attached(mixed)
    ids = torch.arange(9)[None] + 3
    logps = mixed(input_ids=ids, labels=ids, linear_logps="sum").logps
    expected = mixed(ids).logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None]).sum()
    torch.testing.assert_close(logps, expected[None], rtol=1e-6, atol=1e-4)


def test_merging_an_adapter_leaves_the_base_attached() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False
    )
    model = attach_linear_logps(peft.get_peft_model(tiny("llama"), config))
    model(**batch(), linear_logps="sum")
    merged = model.merge_and_unload()
    assert is_attached(merged)
    torch.testing.assert_close(
        merged(**batch(), linear_logps="sum").logps.float(), own_logps(merged, batch())[0].sum(-1)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_references_of_16_bits_are_refused(dtype: torch.dtype) -> None:
    model = attach_linear_logps(tiny("llama"))
    with pytest.raises(TypeError, match=r"expected float64.*Sealed"):
        model(**batch(), infopo=InfoPOOptions(), ref_logps=torch.full((4,), -30.0, dtype=dtype))
    out = model(**batch(), infopo=InfoPOOptions(), ref_logps=Sealed(torch.full((4,), -30.0, dtype=torch.float64)))
    assert out.infopo.ref_logps.tolist() == [-30.0] * 4


@pytest.mark.parametrize("objective", [DPO(0.5), IPO(0.5), SimPO(2.0), SFT()])
def test_other_objectives(objective: Any) -> None:
    model, inputs = tiny("llama"), batch()
    ref_logps = None if objective.reference == "none" else torch.tensor([-30.0, -25.0, -29.0, -31.0]).double()
    tokens, _ = own_logps(model, inputs)
    sums, counts = tokens.double().sum(-1), (inputs["labels"][:, 1:] != -100).sum(-1)
    means = sums / counts
    if isinstance(objective, DPO):
        margin = 0.5 * (sums - ref_logps)
        loss = -torch.nn.functional.logsigmoid(margin[:2] - margin[2:]).mean()
    elif isinstance(objective, IPO):
        ratio = means - ref_logps
        loss = (ratio[:2] - ratio[2:] - 1).square().mean()
    elif isinstance(objective, SimPO):
        loss = -torch.nn.functional.logsigmoid(2 * (means[:2] - means[2:]) - 1).mean()
    else:
        loss = -means[:2].mean()
    loss.backward()
    truth = gradients(model)
    out = attach_linear_logps(model)(**inputs, objective=objective, ref_logps=ref_logps)
    out.loss.backward()
    torch.testing.assert_close(out.loss.double(), loss.detach(), rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(model), truth, 5e-5)
    with pytest.raises(TypeError, match="both given"):
        model(**inputs, objective=objective, infopo=InfoPOOptions())
