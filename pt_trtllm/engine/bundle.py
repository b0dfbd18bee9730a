"""An engine folder: `config.json`, one `rank{r}.engine` per rank, the tokenizer, and a manifest of digests."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pt_trtllm import __version__
from pt_trtllm.checkpoint.artifact import read_json, read_manifest, verify_file
from pt_trtllm.checkpoint.rank_files import CheckpointConfig
from pt_trtllm.config import is_positive_int, problems_to_error, shown
from pt_trtllm.errors import CheckpointError, ConfigError, EngineError
from pt_trtllm.mapping import Mapping

KIND = "engine"


@dataclass(frozen=True, kw_only=True)
class BuildLimits:
    """What an engine is sized for; the names are TensorRT-LLM's."""

    max_batch_size: int = 8
    """Sequences computed together."""
    max_input_len: int = 0
    """Longest prompt; 0 means max_seq_len - 1."""
    max_seq_len: int = 0
    """Prompt and answer together; 0 means the model's max_position_embeddings, at most 4096."""
    max_num_tokens: int = 2048
    """Tokens of one forward pass; longer prompts are computed in chunks."""

    def __post_init__(self) -> None:
        least = {"max_batch_size": 1, "max_input_len": 0, "max_seq_len": 0, "max_num_tokens": 1}
        problems = [
            f"{name} is {shown(getattr(self, name))}, expected a whole number of at least {low}"
            for name, low in least.items()
            if not (is_positive_int(getattr(self, name)) or (getattr(self, name) == 0 and low == 0))
        ]
        problems_to_error("build options", problems)
        if self.max_num_tokens < self.max_batch_size:
            problems.append(f"max_num_tokens {self.max_num_tokens} is below max_batch_size {self.max_batch_size}")
        if 0 < self.max_seq_len <= self.max_input_len:
            problems.append(f"max_input_len {self.max_input_len} leaves no room in max_seq_len {self.max_seq_len}")
        problems_to_error("build options", problems)

    def resolve(self, max_position_embeddings: int) -> BuildLimits:
        """Fills in what was left at 0, and refuses lengths beyond the model's positions."""
        if self.max_seq_len > max_position_embeddings:
            raise ConfigError(
                f"build options: max_seq_len is {self.max_seq_len}, "
                f"but the model has {max_position_embeddings} positions"
            )
        seq_len = self.max_seq_len or min(max_position_embeddings, 4096)
        input_len = min(self.max_input_len or seq_len - 1, seq_len - 1)
        return dataclasses.replace(self, max_seq_len=seq_len, max_input_len=input_len)


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """How to build, for the backends that can be told."""

    targets: tuple[str, ...] = ()
    """Compute capabilities of the GPUs that will run the engine, like "sm89"."""
    gather_context_logits: bool = False
    """Whether the logits of all tokens of a prompt can be asked for."""
    workers: int = 0
    """Ranks built at a time; 0 takes as many as memory and cores allow."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ConfigError(f"build options: workers is {self.workers}, expected 0 or more")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything `config.json` of an engine says."""

    backend: str
    checkpoint: CheckpointConfig
    limits: BuildLimits
    backend_config: dict[str, Any] = field(default_factory=dict)
    """What only this backend reads."""

    @property
    def mapping(self) -> Mapping:
        return self.checkpoint.mapping

    @property
    def has_fixed_cache(self) -> bool:
        """Whether the KV cache has its size from the build: on GPUs, a row for each of `max_batch_size` sequences."""
        return self.backend == "tensorrt"

    def to_json(self) -> dict[str, Any]:
        """TensorRT-LLM's shape: `pretrained_config` and `build_config`."""
        return {
            "version": __version__,
            "backend": self.backend,
            "pretrained_config": self.checkpoint.to_json(),
            "build_config": dataclasses.asdict(self.limits),
            **({"backend_config": self.backend_config} if self.backend_config else {}),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], where: str) -> EngineConfig:
        try:
            if not isinstance(data["backend"], str):
                raise TypeError(f"backend is {shown(data['backend'])}")
            return cls(
                backend=data["backend"],
                checkpoint=CheckpointConfig.from_json(data["pretrained_config"], where),
                limits=BuildLimits(**data.get("limits", data["build_config"])),
                backend_config=data.get("backend_config", {}),
            )
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{where}: not an engine config written by pt-trtllm build: {error!r}") from None


def engine_file(rank: int) -> str:
    return f"rank{rank}.engine"


def open_bundle(folder: Path) -> tuple[EngineConfig, dict[str, Any]]:
    """Configuration and manifest of an engine folder, sizes checked."""
    try:
        manifest = read_manifest(folder, KIND)
        verify_file(folder, "config.json", manifest)
        path = folder / "config.json"
        return EngineConfig.from_json(read_json(path, "an engine"), str(path)), manifest
    except CheckpointError as error:
        raise EngineError(str(error)) from None
