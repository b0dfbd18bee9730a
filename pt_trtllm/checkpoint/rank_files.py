"""The files of a converted checkpoint: TensorRT-LLM's unified layout, declared before anything is written.

config.json          PretrainedConfig's fields, plus `pt`: our own full description
rank{r}.safetensors  every tensor of rank r; several local tracks are stacked on a leading axis
tokenizer/           the tokenizer's files, when the source has them
manifest.json        format version, mapping, tool version, a digest per file
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pt_trtllm.checkpoint.artifact import read_json, read_manifest, verify_file
from pt_trtllm.checkpoint.quantize import Quantization, StoredTensor, stored_name, stored_parts
from pt_trtllm.checkpoint.safetensors_io import DeclaredTensor, SafetensorsReader
from pt_trtllm.checkpoint.spec import ColumnSplit, TensorSpec, model_tensors, rank_rows
from pt_trtllm.config import DTYPES, ModelConfig, is_positive_int, shown
from pt_trtllm.errors import CheckpointError, ConfigError
from pt_trtllm.mapping import Mapping

KIND = "checkpoint"
ARCHITECTURE = "PTForCausalLM"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Everything `config.json` says."""

    model: ModelConfig
    world_size: int
    dtype: str
    quantization: Quantization = dataclasses.field(default_factory=Quantization)

    @property
    def mapping(self) -> Mapping:
        return Mapping(world_size=self.world_size, num_tracks=self.model.num_tracks)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def to_json(self) -> dict[str, Any]:
        """TensorRT-LLM's fields hold global counts; `pt` holds the model as this project reads it back."""
        model, tracks = self.model, self.model.num_tracks
        return {
            "architecture": ARCHITECTURE,
            "dtype": self.dtype,
            "logits_dtype": "float32",
            "vocab_size": model.vocab_size,
            "hidden_size": model.hidden_size,
            "num_hidden_layers": model.num_hidden_layers,
            "num_attention_heads": model.num_attention_heads * tracks,
            "num_key_value_heads": model.num_kv_heads * tracks,
            "head_size": model.head_dim,
            "intermediate_size": (model.intermediate_size or model.moe_intermediate_size or 0) * tracks,
            "hidden_act": "silu",
            "norm_epsilon": model.rms_norm_eps,
            "position_embedding_type": "rope_gptj" if model.rope_style == "interleaved" else "rope_gpt_neox",
            "rotary_base": model.rope_theta,
            "max_position_embeddings": model.max_position_embeddings,
            "qk_layernorm": model.qk_norm != "none",
            "use_parallel_embedding": False,
            "mapping": {"world_size": self.world_size, "tp_size": self.world_size, "pp_size": 1},
            "quantization": self.quantization.to_trtllm(),
            "pt": {"model": model.to_dict(), "quantization": dataclasses.asdict(self.quantization)},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], where: str) -> CheckpointConfig:
        try:
            pt, world_size, dtype = data["pt"], data["mapping"]["world_size"], data["dtype"]
            if not is_positive_int(world_size) or dtype not in DTYPES:
                raise ValueError(f"world_size is {shown(world_size)}, dtype {shown(dtype)}")
            return cls(
                model=ModelConfig.from_dict(pt["model"]),
                world_size=world_size,
                dtype=dtype,
                quantization=Quantization(**pt["quantization"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{where}: not a config written by pt-trtllm convert: {error!r}") from None


def rank_specs(config: CheckpointConfig) -> list[TensorSpec]:
    """A tied head is repeated only where ranks hold shards of it, as TensorRT-LLM expects."""
    separate_head = not config.model.tie_word_embeddings or config.world_size > 1
    return model_tensors(config.model, separate_head=separate_head)


def rank_shape(spec: TensorSpec, part: StoredTensor, mapping: Mapping) -> tuple[int, ...]:
    """Shape of one stored part of one track on one rank."""
    rows = rank_rows(spec, mapping)
    leading = spec.shape[:-2]
    for size in leading:
        rows //= size
    return (*leading, rows) if part.per_row else (*leading, rows, len(rank_columns(part, spec, mapping)))


def rank_columns(part: StoredTensor, spec: TensorSpec, mapping: Mapping) -> range:
    """Columns of a stored part that a rank keeps. Codes, scales and zeros of a group are cut at the same place."""
    if part.per_row or not isinstance(spec.split, ColumnSplit):
        return range(part.columns)
    width = part.columns // mapping.tp_size
    return range(mapping.tp_rank * width, (mapping.tp_rank + 1) * width)


def declare(config: CheckpointConfig, mapping: Mapping) -> list[DeclaredTensor]:
    """The tensors of one rank file."""
    declared = []
    for spec in rank_specs(config):
        for part in stored_parts(spec, config.torch_dtype, config.quantization):
            shape = rank_shape(spec, part, mapping)
            if spec.per_track and mapping.tracks_per_rank > 1:
                shape = (mapping.tracks_per_rank, *shape)
            declared.append(DeclaredTensor(stored_name(spec.name, part), part.dtype, shape))
    return declared


def part_shapes(
    spec: TensorSpec, config: CheckpointConfig, mapping: Mapping
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of all parts of a logical tensor by suffix, with a leading axis of local tracks."""
    tracks = (mapping.tracks_per_rank,) if spec.per_track else ()
    return {
        part.suffix or "weight": (part.dtype, (*tracks, *rank_shape(spec, part, mapping)))
        for part in stored_parts(spec, config.torch_dtype, config.quantization)
    }


class RankReader:
    """A converted checkpoint opened for one rank: digest, names, shapes and types checked before the first tensor."""

    def __init__(self, folder: Path, config: CheckpointConfig, manifest: dict[str, Any], rank: int) -> None:
        name = f"rank{rank}.safetensors"
        verify_file(folder, name, manifest)
        self.mapping = config.mapping.for_rank(rank)
        self.config = config
        self._reader = SafetensorsReader(folder / name)
        expected = {tensor.name: tensor for tensor in declare(config, self.mapping)}
        found = self._reader.tensors
        problems = [f"{key} is missing" for key in expected if key not in found]
        problems += [f"{key} is unexpected" for key in found if key not in expected]
        problems += [
            f"{key} is {found[key].dtype} {list(found[key].shape)}, expected {want.dtype} {list(want.shape)}"
            for key, want in expected.items()
            if key in found and (found[key].dtype, found[key].shape) != (want.dtype, want.shape)
        ]
        if problems:
            raise CheckpointError(f"{folder / name}: {'; '.join(problems[:8])}")

    def read(self, spec: TensorSpec) -> dict[str, torch.Tensor]:
        """All parts of a logical tensor by suffix ('weight' for plain ones), with a leading axis of local tracks."""
        shapes = self.shapes(spec)
        return {
            part.suffix or "weight": self._reader.read(stored_name(spec.name, part)).view(
                shapes[part.suffix or "weight"][1]
            )
            for part in stored_parts(spec, self.config.torch_dtype, self.config.quantization)
        }

    def shapes(self, spec: TensorSpec) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Types and shapes of what `read` returns."""
        return part_shapes(spec, self.config, self.mapping)

    def close(self) -> None:
        self._reader.close()


def open_checkpoint(folder: Path) -> tuple[CheckpointConfig, dict[str, Any]]:
    """Configuration and manifest of a converted checkpoint."""
    manifest = read_manifest(folder, KIND)
    verify_file(folder, "config.json", manifest)
    path = folder / "config.json"
    return CheckpointConfig.from_json(read_json(path, "a converted checkpoint"), str(path)), manifest
