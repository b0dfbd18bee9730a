"""Build recipes: YAML files that name a model, its placement on some hardware, and the limits to build for.

model: pt-30b               a file of the folder `models` beside `recipes`, or the model's fields themselves
sync_interval: 4            optional: replaces the model's
world_size: 8
dtype: bfloat16
quantization: {method: int8_wo}                         optional
build: {backend: tensorrt, targets: [sm90], max_batch_size: 64, ...}
hardware: {gpu: NVIDIA H100 SXM, memory_gib: 80, count: 8}
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pt_trtllm.checkpoint.quantize import Quantization
from pt_trtllm.checkpoint.rank_files import CheckpointConfig
from pt_trtllm.config import ModelConfig, reject_unknown_keys
from pt_trtllm.engine.bundle import BackendOptions, BuildLimits
from pt_trtllm.engine.memory import RankMemory, activation_bytes, kv_cache_bytes, weight_bytes
from pt_trtllm.engine.tensorrt.bindings import cache_capacity
from pt_trtllm.errors import ConfigError

KEYS = {"model", "sync_interval", "world_size", "dtype", "quantization", "build", "hardware"}
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Hardware:
    gpu: str
    memory_gib: float
    """Of one GPU."""
    count: int

    @property
    def usable_gib(self) -> float:
        """The driver and other processes keep a little."""
        return 0.95 * self.memory_gib


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    checkpoint: CheckpointConfig
    backend: str
    limits: BuildLimits
    backend_options: BackendOptions
    hardware: Hardware

    def check_checkpoint(self, found: CheckpointConfig, where: Path) -> None:
        """Raises when a converted checkpoint is not what the recipe describes."""
        wanted = self.checkpoint
        problems = [
            f"{name} is {getattr(found.model, name)!r}, the recipe says {getattr(wanted.model, name)!r}"
            for name in (field.name for field in dataclasses.fields(ModelConfig))
            if name not in NOT_COMPARED and getattr(found.model, name) != getattr(wanted.model, name)
        ]
        problems += [
            f"{name} is {getattr(found, name)}, the recipe says {getattr(wanted, name)}"
            for name in ("world_size", "dtype", "quantization")
            if getattr(found, name) != getattr(wanted, name)
        ]
        if problems:
            raise ConfigError(f"{where} is not the checkpoint of recipe {self.name}: {'; '.join(problems[:5])}")

    def memory(self) -> RankMemory:
        return rank_memory(self.checkpoint, self.limits, self.backend_options)

    def check_memory(self) -> None:
        memory, usable = self.memory(), self.hardware.usable_gib
        if self.hardware.count < self.checkpoint.world_size:
            raise ConfigError(
                f"recipe {self.name}: {self.checkpoint.world_size} ranks on {self.hardware.count} GPUs, "
                "expected one each"
            )
        if memory.total > usable * GIB:
            raise ConfigError(
                f"recipe {self.name}: a rank needs {memory.total / GIB:.1f} GiB, {usable:.1f} of {self.hardware.gpu}'s "
                f"{self.hardware.memory_gib:g} GiB are usable; lower max_batch_size or max_seq_len, quantise, "
                "or use more GPUs"
            )


NOT_COMPARED = {"bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings"}
"""Recipes describe shapes; these belong to the tokenizer and the checkpoint."""


def rank_memory(checkpoint: CheckpointConfig, limits: BuildLimits, options: BackendOptions) -> RankMemory:
    """Of the TensorRT backend, whose cache is laid out for the longest sequence of every slot."""
    capacity = cache_capacity(limits)
    return RankMemory(
        weights=weight_bytes(checkpoint),
        kv_cache=kv_cache_bytes(checkpoint, limits, capacity),
        activations=activation_bytes(checkpoint, limits, capacity, context_logits=options.gather_context_logits),
    )


def read_recipe(path: Path) -> Recipe:
    """Raises a ConfigError that names the file and what is wrong in it."""
    data = _read_yaml(path)
    reject_unknown_keys(f"recipe {path}", data, KEYS)
    missing = sorted({"model", "world_size", "dtype", "build", "hardware"} - set(data))
    if missing:
        raise ConfigError(f"recipe {path}: missing keys {missing}")
    try:
        checkpoint = CheckpointConfig(
            model=_model(path, data),
            world_size=data["world_size"],
            dtype=data["dtype"],
            quantization=Quantization(**data.get("quantization", {})),
        )
        build = dict(data["build"])
        backend = build.pop("backend", "tensorrt")
        options = BackendOptions(
            targets=tuple(build.pop("targets", ())),
            gather_context_logits=build.pop("gather_context_logits", False),
        )
        limits = BuildLimits(**build).resolve(checkpoint.model.max_position_embeddings)
        hardware = Hardware(**data["hardware"])
    except (TypeError, ValueError) as error:
        raise ConfigError(f"recipe {path}: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"recipe {path}: {error}") from None
    checkpoint.mapping.check_model(checkpoint.model)
    return Recipe(
        name=path.stem, checkpoint=checkpoint, backend=backend, limits=limits, backend_options=options,
        hardware=hardware,
    )  # fmt: skip


def _model(path: Path, data: dict[str, Any]) -> ModelConfig:
    model = data["model"]
    if isinstance(model, str):
        model = _read_yaml(path.parent.parent / "models" / f"{model}.yaml")
    if not isinstance(model, dict):
        raise ConfigError(f"model is {model!r}, expected the name of a model file or the model's fields")
    interval = {"sync_interval": data["sync_interval"]} if "sync_interval" in data else {}
    return ModelConfig.from_dict({**model, **interval})


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected a build recipe or the model that one names") from None
    except RecursionError:
        raise ConfigError(f"{path}: cannot be read as YAML: it is nested too deeply") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds a {type(data).__name__}, expected keys and values")
    return data
