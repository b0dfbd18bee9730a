"""Writes a `pt` checkpoint of any size without holding it in memory, to test and measure with."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from pt_trtllm.checkpoint.safetensors_io import DeclaredTensor, SafetensorsWriter
from pt_trtllm.checkpoint.sources.base import part_shape
from pt_trtllm.checkpoint.sources.pt import config_json, spelling
from pt_trtllm.config import ModelConfig


def big_config(num_bytes: int) -> ModelConfig:
    """About a third of the bytes in the embedding, the rest in as many layers as that takes."""
    hidden, intermediate = 2048, 5632
    layer_bytes = 2 * 2 * (hidden * 1024 + 512 * hidden + 3 * hidden * intermediate)
    return ModelConfig(
        vocab_size=num_bytes // 3 // (2 * hidden),
        num_hidden_layers=max(2, num_bytes * 2 // 3 // layer_bytes),
        hidden_size=hidden,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        intermediate_size=intermediate,
        num_tracks=2,
        sync_interval=1,
        tie_word_embeddings=True,
    )


def write_big_checkpoint(
    folder: Path, num_bytes: int, config: ModelConfig | None = None, *, distinct: bool = False
) -> int:
    """Random bfloat16 weights in one file; returns its size. They repeat, for speed, unless `distinct`."""
    config = config or big_config(num_bytes)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_json(config, "bfloat16")))
    declared = [
        DeclaredTensor(part.source_name, torch.bfloat16, part_shape(spec, part))
        for spec, _, parts in spelling(config)
        for part in parts
    ]
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(1 << 22, generator=generator) * 0.02).to(torch.bfloat16)
    with SafetensorsWriter(folder / "model.safetensors", declared) as writer:
        for tensor in declared:
            for first in range(0, total := tensor.num_bytes // 2, len(block)):
                count = min(len(block), total - first)
                if distinct:
                    block[:count] = torch.randn(count, generator=generator) * 0.02
                writer.write(tensor.name, block[:count], first)
    return (folder / "model.safetensors").stat().st_size
