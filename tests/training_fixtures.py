"""A tiny chat model with a byte-level tokenizer, and pairs to train it on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from infopo_kernels.commands.demo.word_problems import word_problems

CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """A token for each byte, and three special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|pad|>", "<|start|>", "<|end|>"]
    vocabulary = {token: index for index, token in enumerate(specials + alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=specials[0], bos_token=specials[1], eos_token=specials[2]
    )
    fast.chat_template = chat_template
    return fast


def tiny_model(architecture: str = "llama", seed: int = 0, **config: Any) -> Any:
    """A random model of two layers. Its weights are large enough, so that its logits differ."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    if architecture == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2}
    elif architecture != "llama":
        sizes |= {"num_key_value_heads": 1, "head_dim": 16}
    common = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
    torch.manual_seed(seed)
    made = transformers.AutoConfig.for_model(architecture, **{**sizes, **common, **config})
    return transformers.AutoModelForCausalLM.from_config(made)


def save_tiny_model(directory: Path, chat_template: str | None = CHAT_TEMPLATE, **config: Any) -> Path:
    """A directory for `from_pretrained`."""
    tiny_model(**config).save_pretrained(directory)
    byte_tokenizer(chat_template).save_pretrained(directory)
    return directory


def write_pairs(path: Path, count: int = 6, seed: int = 0) -> Path:
    """Word problems as JSONL."""
    path.write_text("".join(json.dumps(pair.row()) + "\n" for pair in word_problems(count, seed)), encoding="utf-8")
    return path
