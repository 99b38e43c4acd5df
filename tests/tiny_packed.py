"""Tiny models of every family, as checkpoint folders and as packed folders."""

from pathlib import Path

import torch

import lamoe
from lamoe.backends.base import Formats
from lamoe.backends.cpu import packed_file
from oracles import tiny

SMALL = dict(max_position_embeddings=256)
FAMILIES = {
    "mla q_lora": tiny.HARD.replace(**SMALL),
    "mla": tiny.V2_CASES["plain-rope-greedy-0dense"].replace(**SMALL),
    "moe v1 mha": tiny.config("deepseek", **SMALL),
    "gqa tied": tiny.config("llama", num_key_value_heads=2, tie_word_embeddings=True, **SMALL),
    "odd widths": tiny.config(
        hidden_size=27,
        intermediate_size=75,
        moe_intermediate_size=27,
        n_shared_experts=1,
        vocab_size=71,
        kv_lora_rank=18,
        **SMALL,
    ),
    "lite widths": tiny.config(
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=10944 // 16,
        moe_intermediate_size=1408 // 16,
        **SMALL,
    ),
}


def source(folder: Path, family: str, seed: int = 0) -> Path:
    """Save a tiny random model to `folder`."""
    lamoe.save(tiny.model(FAMILIES[family], seed=seed, dtype=torch.float32), folder)
    return folder


def pack(
    source: Path, target: Path, weights: str = "int4", head: str | None = None, **options
) -> list:
    """Pack a model folder. Return its PackedTensors."""
    formats = Formats(weights, head)
    return [tensor for tensor, _ in packed_file.write(source, target, formats, **options)]


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each file by name."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
