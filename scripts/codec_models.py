"""The models of bench_codecs.py: the example, and two with outlier channels that compute the same function.

Scaling channels of the residual stream cannot be undone by weights: RMSNorm divides by the size of the whole vector.
Two other ways leave the function as it is:

- *principal axes*: the residual stream turned by an orthogonal matrix, which RMSNorm does not notice once its weights
  are folded into the matrices behind it. Turned to the principal axes of the fused hidden states, a few channels carry
  most of the energy. A checkpoint like any other.
- *channels x 64*: the same checkpoint, with some channels multiplied by 64 on their way into a fusion and divided by it
  afterwards. Powers of two: without a codec, not a bit changes. What travels is what a model with such channels sends.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.comm.base import Communicator
from pt_trtllm.comm.local import LocalCommunicator
from pt_trtllm.engine.build import BuildOptions, build
from pt_trtllm.engine.bundle import open_bundle
from pt_trtllm.engine.cpu import CpuEngine, open_engine
from pt_trtllm.network.kv_cache import BLOCK_TOKENS
from pt_trtllm.network.step import SequenceSlice, StepBatch

OUTLIER_CHANNELS = (5, 40, 77, 102)
OUTLIER_FACTOR = 64.0


class ObservedFusion:
    """A communicator whose fusions can be looked at and scaled; everything else is the inner one's."""

    def __init__(self, comm: Communicator, scale: torch.Tensor | None = None) -> None:
        self._comm, self._scale = comm, scale
        self.fused: list[torch.Tensor] = []

    def track_fusion(self, hidden: torch.Tensor, op: str, base: torch.Tensor | None = None) -> torch.Tensor:
        if self._scale is not None:
            fused = self._fuse(hidden * self._scale, op, None if base is None else base * self._scale)
            fused = fused / self._scale
        else:
            fused = self._fuse(hidden, op, base)
        self.fused.append(fused)
        return fused

    def _fuse(self, hidden: torch.Tensor, op: str, base: torch.Tensor | None) -> torch.Tensor:
        return self._comm.track_fusion(hidden, op, base)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)


def outlier_scale(hidden: int) -> torch.Tensor:
    scale = torch.ones(hidden)
    scale[list(OUTLIER_CHANNELS)] = OUTLIER_FACTOR
    return scale


def make_engine(model_dir: Path, folder: Path, world_size: int) -> Path:
    """In float32, so that the codec is the only thing that rounds."""
    convert(model_dir, folder / "checkpoint", ConvertOptions(world_size=world_size, dtype="float32"))
    build(folder / "checkpoint", folder / "engine", BuildOptions())
    return folder / "engine"


def whole_row(row: torch.Tensor) -> StepBatch:
    """One sequence in one step, logits of every token."""
    blocks = tuple(range(-(-len(row) // BLOCK_TOKENS)))
    return StepBatch(
        token_ids=row,
        sequences=(SequenceSlice(slot=0, num_tokens=len(row), past=0, blocks=blocks),),
        logit_rows=torch.arange(len(row)),
        row_top_k=torch.zeros(len(row), dtype=torch.int64),
    )


def open_rank(engine_dir: Path, comm: Communicator) -> CpuEngine:
    config, _ = open_bundle(engine_dir)
    return open_engine(engine_dir, config, comm, config.limits.max_seq_len // BLOCK_TOKENS)


def turn_to_principal_axes(model_dir: Path, rows: list[torch.Tensor], folder: Path) -> Path:
    """Writes the model with its residual stream turned to the principal axes of its last fused states over `rows`."""
    observed = ObservedFusion(LocalCommunicator())
    engine = open_rank(make_engine(model_dir, folder / "upright", 1), observed)
    last = engine.config.checkpoint.model.num_hidden_layers // engine.config.checkpoint.model.interval - 1
    states = []
    for row in rows:
        observed.fused.clear()
        engine.forward(whole_row(row))
        states.append(observed.fused[last])
    second_moment = torch.cat(states).double().T @ torch.cat(states).double()
    turn = torch.linalg.eigh(second_moment).eigenvectors.T  # [new channel, old channel]
    target = folder / "turned"
    target.mkdir()
    save_file(turned(load_file(model_dir / "model.safetensors"), turn), target / "model.safetensors")
    config = json.loads((model_dir / "config.json").read_text())
    config |= {"tie_word_embeddings": False, "dtype": "float32"}
    (target / "config.json").write_text(json.dumps(config))
    return target


def turned(tensors: dict[str, torch.Tensor], turn: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same function with hidden states turn @ h: norms become plain, their weights go into what reads them."""
    old = {name: value.double() for name, value in tensors.items()}
    ones = torch.ones(turn.shape[0], dtype=torch.float64)
    new = dict(old)
    new["model.embed_tokens.weight"] = old["model.embed_tokens.weight"] @ turn.T
    new["lm_head.weight"] = old["model.embed_tokens.weight"] * old["model.norm.weight"] @ turn.T
    new["model.norm.weight"] = ones
    for name in old:
        prefix, _, part = name.partition("input_layernorm.")
        if not part:
            continue
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            for reader in readers:
                weight = f"{prefix}{reader}.weight"
                new[weight] = old[weight] * old[f"{prefix}{norm}.weight"] @ turn.T
            new[f"{prefix}{norm}.weight"] = ones
        for writer in ("self_attn.o_proj", "mlp.down_proj"):
            new[f"{prefix}{writer}.weight"] = turn @ old[f"{prefix}{writer}.weight"]
    return {name: value.float().contiguous().clone() for name, value in new.items()}
