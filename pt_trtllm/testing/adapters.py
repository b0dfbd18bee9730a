"""Random LoRA adapters for a `pt` folder, as PEFT writes them, and the folder with one merged into its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK, ALPHA = 8, 16


def write_adapter(source: Path, target: Path, modules: Sequence[str], seed: int, size: float = 0.1) -> None:
    """`modules` are whole names, such as `model.tracks.3.layers.0.self_attn.q_proj`."""
    weights = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules:
        rows, columns = weights[f"{module}.weight"].shape
        for side, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
            name = f"base_model.model.{module}.lora_{side}.weight"
            tensors[name] = torch.empty(shape).normal_(0, size, generator=generator)
    target.mkdir(parents=True)
    save_file(tensors, target / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "base_model_name_or_path": str(source),
    }  # fmt: skip
    (target / "adapter_config.json").write_text(json.dumps(config))


def merge(source: Path, adapter: Path, target: Path) -> None:
    """W + alpha / rank * B A, in float32."""
    weights = {name: value.float() for name, value in load_file(source / "model.safetensors").items()}
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, a in tensors.items():
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            weights[f"{module}.weight"] += ALPHA / RANK * tensors[name.replace(".lora_A.", ".lora_B.")] @ a
    target.mkdir(parents=True)
    for file in (source / "config.json", *source.glob("tokenizer*")):
        shutil.copy(file, target)
    save_file(weights, target / "model.safetensors")
