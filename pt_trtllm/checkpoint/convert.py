"""Any source -> TensorRT-LLM's unified checkpoint, streamed in blocks of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pt_trtllm.checkpoint.artifact import file_digest, new_folder, write_json, write_manifest
from pt_trtllm.checkpoint.dtypes import cast, target_dtype
from pt_trtllm.checkpoint.quantize import Quantization, quantize_rows, stored_name, stored_parts
from pt_trtllm.checkpoint.rank_files import KIND, CheckpointConfig, declare, rank_columns, rank_specs
from pt_trtllm.checkpoint.safetensors_io import SafetensorsWriter
from pt_trtllm.checkpoint.sources import open_source
from pt_trtllm.checkpoint.sources.base import Source
from pt_trtllm.checkpoint.spec import EMBEDDING, OUTPUT_PROJECTION, TensorSpec, rank_rows, row_runs
from pt_trtllm.mapping import Mapping

Progress = Callable[[int, int], None]
"""Called with (tensors done, tensors in all)."""


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    source: str = "auto"
    world_size: int = 1
    dtype: str = "auto"
    """auto keeps the type of the source's weights."""
    quantization: Quantization = field(default_factory=Quantization)
    force: bool = False


def convert(
    model_dir: Path, output_dir: Path, options: ConvertOptions, progress: Progress = lambda done, total: None
) -> CheckpointConfig:
    """Writes `output_dir` whole or not at all, and returns what its config.json says."""
    source = open_source(model_dir, options.source)
    config = CheckpointConfig(
        model=source.config,
        world_size=options.world_size,
        dtype=target_dtype(options.dtype, source.dtype),
        quantization=options.quantization,
    )
    mapping = config.mapping
    mapping.check_model(source.config)
    for spec in rank_specs(config):
        config.quantization.check(spec, mapping.tp_size)
    with new_folder(output_dir, source=model_dir, force=options.force) as folder:
        _write_ranks(folder, source, config, progress)
        if source.has_tokenizer:
            source.copy_companions(folder / "tokenizer")
        write_json(folder / "config.json", config.to_json())
        digests = {name: file_digest(folder / name) for name in map(rank_file, range(config.world_size))}
        details = {"model_dir": model_dir.name, "world_size": config.world_size, "num_tracks": source.config.num_tracks}
        write_manifest(folder, KIND, details, digests=digests)
    return config


def rank_file(rank: int) -> str:
    return f"rank{rank}.safetensors"


def _write_ranks(folder: Path, source: Source, config: CheckpointConfig, progress: Progress) -> None:
    ranks = [config.mapping.for_rank(rank) for rank in range(config.world_size)]
    writers = [SafetensorsWriter(folder / rank_file(m.rank), declare(config, m), {"format": "pt"}) for m in ranks]
    specs = rank_specs(config)
    for done, spec in enumerate(specs):
        progress(done, len(specs))
        read_as = spec
        if spec.name == OUTPUT_PROJECTION and config.model.tie_word_embeddings:
            read_as = next(candidate for candidate in specs if candidate.name == EMBEDDING)
        for track_idx in range(config.model.num_tracks if spec.per_track else 1):
            owners = config.mapping.owners(track_idx) if spec.per_track else range(config.world_size)
            for first_row, block in source.blocks(read_as, track_idx):
                parts = _to_parts(spec, block, config)
                for rank in owners:
                    _write_block(writers[rank], spec, parts, config, ranks[rank], track_idx, first_row)
        _pad_vocabulary(writers, spec, config, ranks)
    for writer in writers:
        writer.close()
    progress(len(specs), len(specs))


def _to_parts(spec: TensorSpec, block: torch.Tensor, config: CheckpointConfig) -> list[torch.Tensor]:
    if spec.quantizable and config.quantization.method != "none":
        return quantize_rows(block, config.torch_dtype, config.quantization)
    return [cast(block, config.torch_dtype, spec.name)]


def _write_block(
    writer: SafetensorsWriter, spec: TensorSpec, parts: list[torch.Tensor], config: CheckpointConfig,
    mapping: Mapping, track_idx: int, first_row: int,
) -> None:  # fmt: skip
    """Writes what one rank keeps of a block of rows of one track."""
    stacked = spec.per_track and mapping.tracks_per_rank > 1
    track_rows = (track_idx - mapping.local_tracks.start) * rank_rows(spec, mapping) if stacked else 0
    for part, values in zip(stored_parts(spec, config.torch_dtype, config.quantization), parts, strict=True):
        columns = rank_columns(part, spec, mapping)
        for run in row_runs(spec, mapping, first_row, values.shape[0]):
            kept = values[run.source_row : run.source_row + run.rows, columns.start : columns.stop]
            writer.write(stored_name(spec.name, part), kept, (track_rows + run.target_row) * len(columns))


def _pad_vocabulary(
    writers: list[SafetensorsWriter], spec: TensorSpec, config: CheckpointConfig, ranks: list[Mapping]
) -> None:
    """Fills the rows past the vocabulary (it is padded to a multiple of the world size) with zeros."""
    if spec.name != OUTPUT_PROJECTION:
        return
    for writer, mapping in zip(writers, ranks, strict=True):
        shard = mapping.vocab_shard(spec.rows)
        real = max(0, min(shard.stop, spec.rows) - shard.start)
        if real < len(shard):
            zeros = torch.zeros(len(shard) - real, spec.columns, dtype=config.torch_dtype)
            writer.write(spec.name, zeros, real * spec.columns)
