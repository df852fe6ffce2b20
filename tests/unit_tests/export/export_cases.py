"""Small runs to export: a Megatron checkpoint of random weights, with a tokenizer of ours."""

import sysconfig
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AfmoeConfig

from tests.reference.hf_random import random_model, save_as_bf16
from trinity_megatron.checkpoint.convert import hf_to_megatron
from trinity_megatron.data.tokenizer import save_tokenizer, train_tokenizer

TEXTS = [
    "def add(first, second):\n    return first + second  # a sum\n\n\n" * 4,
    "The quick brown fox, 12345 times, jumped over 67 lazy dogs (or not).\n" * 4,
    "Grüße aus München: 日本語と한국어, 3.14159 & émigré naïveté!\n" * 4,
]
MODEL: dict[str, Any] = {
    "hidden_size": 160,
    "intermediate_size": 200,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_dense_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "route_scale": 2.0,
    "global_attn_every_n_layers": 4,
    "sliding_window": 16,
    "rms_norm_eps": 1e-5,
    "mup_enabled": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "max_position_embeddings": 256,
}


def make_tokenizer(folder: Path) -> Tokenizer:
    """Our own byte-level BPE of 300 tokens."""
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    save_tokenizer(tokenizer, folder)
    return tokenizer


def make_run(folder: Path, *, seed: int = 5, **overrides: Any) -> Path:
    """A Hugging Face checkpoint in bf16 (``hf``) and its Megatron twin; returns the latter.

    Its sizes are no multiples of 128.
    """
    hf, megatron = folder / "hf", folder / "megatron"
    config = AfmoeConfig(**{**MODEL, "vocab_size": 303, **overrides})
    save_as_bf16(random_model(config, seed), hf, max_shard_size="300KB")
    make_tokenizer(hf)
    hf_to_megatron(hf, megatron)
    return megatron


def random_run(folder: Path) -> Path:
    """A run of sizes that are multiples of 32, with a tokenizer of a text of Python's own."""
    hf, megatron = folder / "hf", folder / "megatron"
    sizes = {"hidden_size": 192, "intermediate_size": 256, "head_dim": 64, "vocab_size": 3000}
    save_as_bf16(random_model(AfmoeConfig(**{**MODEL, **sizes}), 3), hf)
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-m]*.py"))
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in sources]
    save_tokenizer(train_tokenizer([*texts, *TEXTS], vocab_size=3000), hf)
    hf_to_megatron(hf, megatron)
    return megatron


def tokens(num: int = 60) -> torch.Tensor:
    """int64 ``[2, num]``."""
    return torch.randint(300, (2, num), generator=torch.Generator().manual_seed(1))
