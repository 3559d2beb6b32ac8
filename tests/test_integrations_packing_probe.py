"""Packed rows are refused where a model mixes their sequences, and taken where it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from infopo_kernels.integrations.collators import PackedPreferenceCollator, PreferenceCollator  # noqa: E402
from infopo_kernels.integrations.transformers import attach_linear_logps  # noqa: E402

_SIZES = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip
_LINEAR = {f"linear_{name}": 2 for name in ("num_key_heads", "num_value_heads")}
_LINEAR |= {f"linear_{name}": 16 for name in ("key_head_dim", "value_head_dim")}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_GPT = {"vocab_size": 128, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
MIX: dict[str, dict[str, Any]] = {
    "gpt_oss": {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "lfm2": {**_SIZES, "layer_types": ["conv", "full_attention"]},
    "qwen3_next": {**_SIZES, **_LINEAR, "layer_types": ["linear_attention", "full_attention"], **_EXPERTS},
    "mamba": {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "opt": {
        "vocab_size": 128, "hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
    },
    "bloom": {**_GPT, "hidden_size": 32},
    "bert": {**_SIZES, "is_decoder": False},
}  # fmt: skip
KEEP_APART: dict[str, dict[str, Any]] = {
    "llama": _SIZES,
    "gemma3_text": {**_SIZES, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {**_GPT, "n_embd": 32, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "mixtral": {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def made(kind: str, sizes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return attach_linear_logps(model)


def pairs() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 120, (count,), generator=generator).tolist()

    return [{"prompt_ids": ids(7), "chosen_ids": ids(9), "rejected_ids": ids(5)} for _ in range(2)]


def packed(**options: Any) -> dict[str, Any]:
    return {key: value for key, value in PackedPreferenceCollator(**options)(pairs()).items() if key != "is_chosen"}


@pytest.mark.parametrize("kind", MIX)
def test_a_model_that_mixes_is_refused(kind: str) -> None:
    model = made(kind, MIX[kind]).train()
    for _ in range(2):  # the verdict stays
        with pytest.raises(ValueError, match=r"mixes the sequences of a packed row.*PreferenceCollator"):
            model(**packed(), linear_logps="sum")
    assert all(module.training for module in model.modules())
    assert model(**PreferenceCollator()(pairs()), linear_logps="sum").logps.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KEEP_APART)
def test_a_model_that_keeps_apart_is_asked_once(kind: str, dtype: torch.dtype) -> None:
    model = made(kind, KEEP_APART[kind]).to(dtype).train()
    model.requires_grad_(False)
    frozen = next(module for module in model.modules() if isinstance(module, torch.nn.Linear)).eval()
    calls: list[int] = []
    layer = next(module for name, module in model.named_modules() if name.endswith(".0"))
    layer.register_forward_hook(lambda *_: calls.append(int(layer.training)))
    apart = (
        PackedPreferenceCollator()(pairs()) if kind != "llama" else PackedPreferenceCollator(share_prompt=True)(pairs())
    )
    inputs = {key: value for key, value in apart.items() if key != "is_chosen"}
    for _ in range(2):
        found = model(**inputs, linear_logps="sum").logps
    assert calls == [0, 0, 1, 1]
    assert not frozen.training
    truth = model.eval()(**PreferenceCollator()(pairs()), linear_logps="sum").logps
    torch.testing.assert_close(found, truth, rtol=1e-5 if dtype == torch.float32 else 0.02, atol=1e-4)


def test_learned_prompts_are_refused_for_packs_and_served_padded() -> None:
    peft = pytest.importorskip("peft")
    for config in (
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ):
        model = peft.get_peft_model(made("llama", _SIZES), config)
        with pytest.raises(ValueError, match="learned prompts"):
            model(**packed(), linear_logps="sum")
        batch = PreferenceCollator()(pairs())
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logits = logits[:, -batch["input_ids"].shape[1] :][:, :-1]
        labels = batch["labels"][:, 1:]
        truth = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1) * (labels != -100)
        torch.testing.assert_close(
            model(**batch, linear_logps="sum").logps.float(), truth.sum(-1), rtol=1e-5, atol=1e-4
        )


def test_a_row_without_positions_is_refused() -> None:
    inputs = packed()
    del inputs["position_ids"]
    with pytest.raises(ValueError, match="`position_ids` are missing"):
        made("llama", _SIZES)(**inputs, linear_logps="sum")
