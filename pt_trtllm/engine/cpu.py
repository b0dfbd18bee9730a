"""The CPU engine: weights packed for this processor's kernels, opened by memory map.

`rank{r}.engine` is a safetensors file (aligned to pages) whose metadata holds the plan; names are those of the
checkpoint, gathered per linear as `<name>` (float), `<name>.int8`/`.scale`, or `<name>.int4`/`.scale_zero`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pt_trtllm.checkpoint.quantize import unpack_int4
from pt_trtllm.checkpoint.rank_files import RankReader, rank_specs
from pt_trtllm.checkpoint.safetensors_io import DeclaredTensor, SafetensorsWriter, read_header
from pt_trtllm.checkpoint.spec import EMBEDDING, OUTPUT_PROJECTION, TensorSpec
from pt_trtllm.comm.base import Communicator
from pt_trtllm.engine.bundle import EngineConfig, engine_file
from pt_trtllm.errors import ConfigError, EngineError
from pt_trtllm.network.decoder import pt_decoder
from pt_trtllm.network.kv_cache import TorchKvCache
from pt_trtllm.network.rope import rope_tables
from pt_trtllm.network.step import StepBatch
from pt_trtllm.network.torch_linear import FloatLinear, Int4Linear, Int8Linear, Linear, pack_int4
from pt_trtllm.network.torch_ops import RankWeights, TorchGraph

FORMAT = "pt-cpu-engine-1"
INT4_ROW_MULTIPLE = 16
"""The packed int4 kernel works on blocks of this many output rows."""


def build_ranks(
    checkpoint_dir: Path,
    manifest: dict[str, Any],
    config: EngineConfig,
    folder: Path,
    progress: Callable[[int, int], None],
) -> None:
    specs = [spec for spec in rank_specs(config.checkpoint) if not _is_view_of_embedding(spec, config)]
    total, done = len(specs) * config.checkpoint.world_size, 0
    for rank in range(config.checkpoint.world_size):
        reader = RankReader(checkpoint_dir, config.checkpoint, manifest, rank)
        metadata = {"format": FORMAT, "plan": json.dumps(_plan(config, rank))}
        declared = [tensor for spec in specs for tensor in _declare(spec, reader)]
        with SafetensorsWriter(folder / engine_file(rank), declared, metadata) as writer:
            for spec in specs:
                progress(done, total)
                for name, values in _pack(spec, reader.read(spec)).items():
                    writer.write(name, values)
                done += 1
        reader.close()
    progress(total, total)


def _plan(config: EngineConfig, rank: int) -> dict[str, Any]:
    plan: dict[str, Any] = {"rank": rank, "config": config.to_json()}
    if config.checkpoint.quantization.method == "int4_wo":
        plan["int4_layout"] = torch.backends.cpu.get_cpu_capability()
    return plan


def _is_view_of_embedding(spec: TensorSpec, config: EngineConfig) -> bool:
    return spec.name == OUTPUT_PROJECTION and config.checkpoint.model.tie_word_embeddings


def _declare(spec: TensorSpec, reader: RankReader) -> list[DeclaredTensor]:
    """Names, types and shapes of a packed tensor, found by packing an empty one's worth of metadata."""
    with torch.device("meta"):
        parts = {key: torch.empty(shape, dtype=dtype) for key, (dtype, shape) in reader.shapes(spec).items()}
    packed = _pack(spec, parts)
    return [DeclaredTensor(name, values.dtype, tuple(values.shape)) for name, values in packed.items()]


def _pack(spec: TensorSpec, parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Checkpoint parts [tracks, ...] to what the kernels read."""
    weight, base = parts["weight"], spec.name.removesuffix(".weight")
    if weight.dtype == torch.int8:
        return {f"{base}.int8": weight, f"{base}.scale": parts["per_channel_scale"]}
    if weight.dtype == torch.uint8:
        if weight.shape[-2] % INT4_ROW_MULTIPLE:
            raise ConfigError(
                f"int4_wo: {spec.name} has {weight.shape[-2]} outputs per rank, the CPU kernel needs a multiple of "
                f"{INT4_ROW_MULTIPLE}; use int8_wo"
            )
        scale_zero = torch.stack((parts["weights_scaling_factor"], parts["zero"]), dim=-1).transpose(-3, -2)
        packed = weight if weight.is_meta else pack_int4(unpack_int4(weight))
        return {f"{base}.int4": packed, f"{base}.scale_zero": scale_zero.contiguous()}
    return {spec.name: weight}


class CpuEngine:
    """One rank's engine, opened: `forward` runs a step over this rank's share of the model."""

    def __init__(self, folder: Path, config: EngineConfig, comm: Communicator, num_blocks: int) -> None:
        self.config, self.comm = config, comm
        self.mapping = config.mapping.for_rank(comm.rank)
        checkpoint, limits = config.checkpoint, config.limits
        tensors = map_tensors(folder / engine_file(comm.rank), config, comm.rank)
        self.weights = _load(tensors, config, comm.rank)
        self.cache = TorchKvCache(
            checkpoint.model,
            self.mapping,
            num_blocks=num_blocks,
            num_slots=limits.max_batch_size,
            max_seq_len=limits.max_seq_len,
            dtype=checkpoint.torch_dtype,
        )

    @torch.inference_mode()
    def forward(self, batch: StepBatch) -> torch.Tensor:
        """float32 logits [rows, vocabulary] on rank 0, an empty tensor elsewhere."""
        graph = TorchGraph(self.weights, self.cache, self.comm, batch, self.mapping.tracks_per_rank)
        return pt_decoder(graph, self.config.checkpoint.model, self.mapping)


def open_engine(folder: Path, config: EngineConfig, comm: Communicator, num_blocks: int) -> CpuEngine:
    """Opens this rank's file, with a KV cache of `num_blocks` blocks."""
    return CpuEngine(folder, config, comm, num_blocks)


def map_tensors(path: Path, config: EngineConfig, rank: int) -> dict[str, torch.Tensor]:
    """The tensors of an engine file, mapped (private, lazily read), after its plan was checked."""
    infos, metadata = read_header(path)
    if metadata.get("format") != FORMAT:
        raise EngineError(f"{path}: format {metadata.get('format')!r}, expected {FORMAT!r}; build the engine again")
    plan = json.loads(metadata["plan"])
    if plan["rank"] != rank or plan["config"] != config.to_json():
        raise EngineError(f"{path}: its plan does not belong to this folder's config.json; build the engine again")
    layout = plan.get("int4_layout")
    if layout is not None and layout != (here := torch.backends.cpu.get_cpu_capability()):
        raise EngineError(
            f"{path}: int4 weights are packed for {layout}, this processor's kernels read {here}; build on this machine"
        )
    storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)
    return {
        name: torch.empty(0, dtype=info.dtype).set_(  # type: ignore[call-overload]  # strides are optional
            storage, info.start // info.dtype.itemsize, info.shape
        )
        for name, info in infos.items()
    }


def _load(tensors: dict[str, torch.Tensor], config: EngineConfig, rank: int) -> RankWeights:
    checkpoint, mapping = config.checkpoint, config.mapping.for_rank(rank)
    model, plain = checkpoint.model, {}
    linears: dict[str, Linear] = {}
    experts: dict[str, list[list[Linear]]] = {}
    for spec in rank_specs(checkpoint):
        if _is_view_of_embedding(spec, config):
            continue
        if not spec.quantizable:
            plain[spec.name] = tensors[spec.name]
        elif len(spec.shape) == 2:
            linears[spec.name] = _linear(spec, tensors, config)
        else:
            experts[spec.name] = _experts(spec, tensors, config, mapping.tracks_per_rank)
    shard = mapping.vocab_shard(model.vocab_size)
    head = plain[EMBEDDING][shard.start : shard.stop] if model.tie_word_embeddings else plain[OUTPUT_PROJECTION]
    return RankWeights(
        tensors=plain,
        linears=linears,
        experts=experts,
        rope=rope_tables(model, config.limits.max_seq_len),
        rope_style=model.rope_style,
        head=head,
        head_rows=len(shard),
        vocab_size=model.vocab_size,
    )


def _linear(spec: TensorSpec, tensors: dict[str, torch.Tensor], config: EngineConfig) -> Linear:
    base, method = spec.name.removesuffix(".weight"), config.checkpoint.quantization.method
    if method == "int8_wo":
        return Int8Linear(tensors[f"{base}.int8"], tensors[f"{base}.scale"])
    if method == "int4_wo":
        group_size = config.checkpoint.quantization.group_size
        return Int4Linear(tensors[f"{base}.int4"], tensors[f"{base}.scale_zero"], group_size)
    return FloatLinear(tensors[spec.name])


def _experts(
    spec: TensorSpec, tensors: dict[str, torch.Tensor], config: EngineConfig, num_tracks: int
) -> list[list[Linear]]:
    """Every expert of every local track as a linear of its own: tensors are [tracks, experts, ...]."""
    base = spec.name.removesuffix(".weight")
    mine = {name: values for name, values in tensors.items() if name == spec.name or name.rpartition(".")[0] == base}
    return [
        [
            _linear(spec, {name: values[track, expert][None] for name, values in mine.items()}, config)
            for expert in range(spec.shape[0])
        ]
        for track in range(num_tracks)
    ]
