"""Any source -> the project's own `pt` layout, which vLLM serves; streamed in blocks of rows.

config.json                         what the model is; `model_type` is "parallel_track"
model.safetensors                   or shards `model-00001-of-00003.safetensors`, with `model.safetensors.index.json`
tokenizer.json, ...                 tokenizer, chat template and generation settings, when the source has them
manifest.json                       tool version, a digest per file

The folder is a source again. Its manifest is for `--force`, which replaces only what this project wrote, and for
`inspect --verify`; reading does not ask for it, so that a chat template may be added or a tokenizer replaced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pt_trtllm.checkpoint.artifact import new_folder, write_json, write_manifest
from pt_trtllm.checkpoint.dtypes import cast, target_dtype
from pt_trtllm.checkpoint.safetensors_io import DeclaredTensor, SafetensorsWriter
from pt_trtllm.checkpoint.sources import KIND, open_source, pt
from pt_trtllm.checkpoint.sources.base import Part, Source, part_shape
from pt_trtllm.checkpoint.spec import TensorSpec
from pt_trtllm.config import ModelConfig, shown
from pt_trtllm.errors import ConfigError

TARGETS = ("pt",)
WEIGHTS = "model.safetensors"
MAX_SHARDS = 500
"""All of them are open while weights are written, and a process has 1024 files at most, as a rule."""

Progress = Callable[[int, int], None]
"""Called with (tensors done, tensors in all)."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    to: str = "pt"
    source: str = "auto"
    dtype: str = "auto"
    """One type for all weights; auto keeps that of the source's."""
    max_shard_bytes: int = 5_000_000_000
    """Weights beyond it are divided into several files; a larger tensor has a file of its own."""
    force: bool = False

    def __post_init__(self) -> None:
        if self.to not in TARGETS:
            raise ConfigError(f"to is {self.to!r}, expected one of {list(TARGETS)}")
        if not isinstance(self.max_shard_bytes, int) or self.max_shard_bytes < 1:
            raise ConfigError(f"max_shard_bytes is {shown(self.max_shard_bytes)}, expected a positive whole number")


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """What has been written."""

    model: ModelConfig
    dtype: str
    num_bytes: int
    """Of all weights."""
    num_files: int
    has_tokenizer: bool


def export(
    model_dir: Path,
    output_dir: Path,
    options: ExportOptions | None = None,
    progress: Progress = lambda done, total: None,
) -> ExportedModel:
    """Writes `output_dir` whole or not at all. It holds the weights of the source, in a layout that does not depend on
    a number of ranks."""
    options = options or ExportOptions()
    source = open_source(model_dir, options.source)
    dtype = target_dtype(options.dtype, source.dtype)
    shards = plan_shards(declare(source.config, getattr(torch, dtype)), options.max_shard_bytes)
    with new_folder(output_dir, source=model_dir, force=options.force) as folder:
        _write_weights(folder, source, shards, progress)
        source.copy_companions(folder)
        write_json(folder / "config.json", pt.config_json(source.config, dtype))
        written = pt.open_source(folder)  # names, shapes and types, read back
        assert written.config == source.config, f"{written.config} was written for {source.config}"
        write_manifest(folder, KIND, {"model_dir": model_dir.name, "format": options.to})
    return ExportedModel(
        model=source.config,
        dtype=dtype,
        num_bytes=_num_bytes(shards),
        num_files=len(shards),
        has_tokenizer=source.has_tokenizer,
    )


def declare(config: ModelConfig, dtype: torch.dtype) -> list[DeclaredTensor]:
    """Every tensor of the exported model, in the order in which it is written."""
    return [
        DeclaredTensor(part.source_name, dtype, part_shape(spec, part))
        for spec, _, parts in pt.spelling(config)
        for part in parts
    ]


def plan_shards(tensors: Iterable[DeclaredTensor], max_bytes: int) -> dict[str, list[DeclaredTensor]]:
    """File name -> its tensors, in order. One file where all fit in it, as Hugging Face does it."""
    shards: list[list[DeclaredTensor]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.num_bytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(tensor)
        room -= tensor.num_bytes
    if len(shards) > MAX_SHARDS:
        raise ConfigError(
            f"weights in files of {max_bytes} bytes make {len(shards)} files, expected at most {MAX_SHARDS}; "
            "give a larger --max-shard-size"
        )
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def _num_bytes(shards: dict[str, list[DeclaredTensor]]) -> int:
    return sum(tensor.num_bytes for shard in shards.values() for tensor in shard)


def _write_weights(folder: Path, source: Source, shards: dict[str, list[DeclaredTensor]], progress: Progress) -> None:
    with contextlib.ExitStack() as files:
        writer_of = {}
        for file_name, tensors in shards.items():  # all at once: a full disk is found before hours of work
            writer = files.enter_context(SafetensorsWriter(folder / file_name, tensors, {"format": "pt"}))
            writer_of.update({tensor.name: writer for tensor in tensors})
        places = list(pt.spelling(source.config))
        for done, (spec, track_idx, parts) in enumerate(places):
            progress(done, len(places))
            for first_row, block in source.blocks(spec, track_idx):
                _write_block(writer_of, spec, parts, first_row, block)
        progress(len(places), len(places))
    if len(shards) > 1:
        weight_map = {tensor.name: file_name for file_name, tensors in shards.items() for tensor in tensors}
        write_json(
            folder / f"{WEIGHTS}.index.json",
            {"metadata": {"total_size": _num_bytes(shards)}, "weight_map": weight_map},
        )


def _write_block(
    writer_of: dict[str, SafetensorsWriter], spec: TensorSpec, parts: Sequence[Part], first_row: int,
    block: torch.Tensor,
) -> None:  # fmt: skip
    """Rows [first_row, ...) of a logical tensor, each where the part that holds it says."""
    start = 0
    for part in parts:
        low, high = max(start, first_row), min(start + part.rows, first_row + len(block))
        if low < high:
            writer = writer_of[part.source_name]
            rows = cast(block[low - first_row : high - first_row], writer.declared[part.source_name].dtype, spec.name)
            writer.write(part.source_name, rows, (low - start) * spec.columns)
        start += part.rows
