"""Writes a `pt` folder anew with its projections quantised, as compressed-tensors stores them, and the float folder
that means the same: what a quantised model should answer, up to what happens to its activations."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

Kind = Literal["int8_w8a8", "int4_w4a16", "fp8_w8a8"]
MATRIX = re.compile(r"(.+\.(?:[qkvo]_proj|gate_proj|up_proj|down_proj))\.weight")
GROUP = 32
FORMATS = {"int8_w8a8": "int-quantized", "int4_w4a16": "pack-quantized", "fp8_w8a8": "float-quantized"}


@dataclass(frozen=True)
class Quantised:
    """Two folders: what vLLM serves, and the same numbers in float32."""

    folder: Path
    plain: Path


def quantise(source: Path, target: Path, kind: Kind, ignore: tuple[str, ...] = ()) -> Quantised:
    """`ignore`: whole names of modules, as in the config. The head and the embedding stay float anyway."""
    pair = Quantised(target / "quantised", target / "plain")
    tensors = load_file(source / "model.safetensors")
    stored, meant = {}, {}
    for name, value in tensors.items():
        found = MATRIX.fullmatch(name)
        if found is None or found[1] in ignore:
            stored[name] = meant[name] = value
            continue
        parts, meant[name] = quantise_matrix(value.float(), kind)
        stored.update({f"{found[1]}.{part}": tensor for part, tensor in parts.items()})
    config = json.loads((source / "config.json").read_text())
    for folder, weights, more in (
        (pair.folder, stored, {"quantization_config": description(kind, ("lm_head", *ignore))}),
        (pair.plain, meant, {}),
    ):
        folder.mkdir(parents=True)
        for file in source.glob("tokenizer*"):
            shutil.copy(file, folder)
        save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({**config, **more}))
    return pair


def description(kind: Kind, ignore: tuple[str, ...]) -> dict[str, Any]:
    weights: dict[str, Any] = {
        "num_bits": 4 if kind == "int4_w4a16" else 8,
        "type": "float" if kind == "fp8_w8a8" else "int",
        "symmetric": True, "dynamic": False,
        "strategy": "group" if kind == "int4_w4a16" else "channel",
        "group_size": GROUP if kind == "int4_w4a16" else None,
    }  # fmt: skip
    inputs = None
    if kind != "int4_w4a16":
        inputs = {"num_bits": 8, "type": weights["type"], "symmetric": True, "dynamic": True, "strategy": "token"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": FORMATS[kind], "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": list(ignore), "kv_cache_scheme": None,
    }  # fmt: skip


def quantise_matrix(matrix: torch.Tensor, kind: Kind) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors that stand for a float matrix [out, in], and what they mean."""
    if kind == "int4_w4a16":
        return _int4(matrix)
    top = 448.0 if kind == "fp8_w8a8" else 127.0
    scale = matrix.abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / top
    if kind == "fp8_w8a8":
        numbers = (matrix / scale).clamp(-top, top).to(torch.float8_e4m3fn)
    else:
        numbers = (matrix / scale).round().clamp(-top, top).to(torch.int8)
    return {"weight": numbers, "weight_scale": scale}, numbers.float() * scale


def _int4(matrix: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    rows, columns = matrix.shape
    groups = matrix.view(rows, columns // GROUP, GROUP)
    scale = groups.abs().amax(dim=2, keepdim=True).clamp(min=1e-8) / 7
    numbers = (groups / scale).round().clamp(-8, 7)
    nibbles = (numbers.view(rows, columns // 8, 8) + 8).to(torch.int64)
    packed = (nibbles << (4 * torch.arange(8))).sum(dim=2)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    parts = {
        "weight_packed": packed, "weight_scale": scale.squeeze(2), "weight_shape": torch.tensor([rows, columns]),
    }  # fmt: skip
    return parts, (numbers * scale).view(rows, columns)
