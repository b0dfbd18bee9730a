"""Random `pt` folders of any description, with weights large enough that every part shows in the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pt_trtllm.checkpoint.sources.pt import layer_prefix, locate
from pt_trtllm.checkpoint.spec import model_tensors
from pt_trtllm.config import ModelConfig

SMALL: dict[str, Any] = {
    "vocab_size": 512, "num_tracks": 2, "num_hidden_layers": 4, "sync_interval": 2, "hidden_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 256,
    "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip


def write_random(folder: Path, seed: int = 0, **options: Any) -> Path:
    fields = {**SMALL, **options}
    config = ModelConfig.from_dict(fields)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for spec in model_tensors(config, separate_head=not config.tie_word_embeddings):
        for track_idx in range(config.num_tracks if spec.per_track else 1):
            for part in locate(config, spec, track_idx, layer_prefix):
                shape = (part.rows,) if len(spec.shape) == 1 else (part.rows, spec.columns)
                value = torch.empty(shape)
                if "norm" in part.source_name:
                    value.uniform_(0.5, 1.5, generator=generator)
                else:
                    value.normal_(0, 0.15, generator=generator)
                tensors[part.source_name] = value
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    described = {"model_type": "parallel_track", "architectures": ["PTForCausalLM"], "dtype": "float32", **fields}
    (folder / "config.json").write_text(json.dumps(described))
    return folder
