"""The CPU engine: one memory-mapped file per rank, and the kernels that stream its weights.

Weights of float8 are widened to the checkpoint's type when an engine is opened: processors do not multiply them.

`rank{r}.engine` is a safetensors file (aligned to pages) whose metadata holds the plan. Names are those of the
checkpoint; a leading axis of local tracks is always there. The kernels read weights as they are stored, so an engine
runs on every processor.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from pt_trtllm.checkpoint.quantize import E4M3, dequantize
from pt_trtllm.checkpoint.rank_files import CheckpointConfig, RankReader, rank_specs
from pt_trtllm.checkpoint.safetensors_io import DeclaredTensor, SafetensorsWriter, read_header
from pt_trtllm.checkpoint.spec import EMBEDDING, OUTPUT_PROJECTION, TensorSpec
from pt_trtllm.comm.base import Communicator
from pt_trtllm.engine.bundle import BackendOptions, BuildLimits, EngineConfig, engine_file
from pt_trtllm.errors import ConfigError, EngineError
from pt_trtllm.network.decoder import pt_decoder
from pt_trtllm.network.kv_cache import KV_CACHE_DTYPES, cache_type, make_cache
from pt_trtllm.network.logits import Logits, unpack
from pt_trtllm.network.program.program import compile_program
from pt_trtllm.network.rope import rope_tables
from pt_trtllm.network.step import StepBatch
from pt_trtllm.network.torch_linear import Linear, make_linear
from pt_trtllm.network.torch_ops import RankWeights, TorchGraph

FORMAT = "pt-cpu-engine-2"
SCALES = ("weights_scaling_factor", "per_channel_scale", "zero")


def settle(checkpoint: CheckpointConfig, limits: BuildLimits, options: BackendOptions) -> dict[str, Any]:
    """Nothing to decide: an engine runs on every processor, and gives any logits."""
    if options.targets:
        raise ConfigError(
            f"--target {','.join(options.targets)}: backend cpu builds for no GPU; leave it out, "
            "or use --backend tensorrt"
        )
    return {}


def build_ranks(
    checkpoint_dir: Path,
    manifest: dict[str, Any],
    config: EngineConfig,
    folder: Path,
    progress: Callable[[int, int], None],
    options: BackendOptions,
) -> dict[str, Any]:
    """One file per rank; there is nothing to add to the manifest."""
    num_ranks = config.checkpoint.world_size
    for rank in range(num_ranks):
        reader = RankReader(checkpoint_dir, config.checkpoint, manifest, rank)

        def tick(done: int, total: int, rank: int = rank) -> None:
            progress(rank * total + done, num_ranks * total)

        write_rank(folder, config, rank, reader, tick)
        reader.close()
    return {}


class RankSource(Protocol):
    """One rank's tensors, by suffix of their parts, with a leading axis of local tracks."""

    def shapes(self, spec: TensorSpec) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]: ...

    def read(self, spec: TensorSpec) -> dict[str, torch.Tensor]: ...


def write_rank(
    folder: Path, config: EngineConfig, rank: int, source: RankSource, progress: Callable[[int, int], None]
) -> None:
    """Writes one rank's engine file."""
    specs = [spec for spec in rank_specs(config.checkpoint) if not _is_view_of_embedding(spec, config)]
    metadata = {"format": FORMAT, "plan": json.dumps(_plan(config, rank))}
    declared = [tensor for spec in specs for tensor in _declare(spec, source)]
    with SafetensorsWriter(folder / engine_file(rank), declared, metadata) as writer:
        for done, spec in enumerate(specs):
            progress(done, len(specs))
            for part, values in source.read(spec).items():
                writer.write(_engine_name(spec, part), values)
    progress(len(specs), len(specs))


def _plan(config: EngineConfig, rank: int) -> dict[str, Any]:
    return {"rank": rank, "config": config.to_json()}


def _is_view_of_embedding(spec: TensorSpec, config: EngineConfig) -> bool:
    return spec.name == OUTPUT_PROJECTION and config.checkpoint.model.tie_word_embeddings


def _declare(spec: TensorSpec, source: RankSource) -> list[DeclaredTensor]:
    return [
        DeclaredTensor(_engine_name(spec, part), dtype, shape) for part, (dtype, shape) in source.shapes(spec).items()
    ]


def _engine_name(spec: TensorSpec, part: str) -> str:
    """The weight keeps its name; its scales and zeros sit beside it."""
    return spec.name.removesuffix("weight") + part if spec.quantizable else spec.name


class CpuEngine:
    """One rank's engine, opened: `forward` runs a step over this rank's share of the model."""

    shares_blocks = True

    def __init__(
        self,
        folder: Path,
        config: EngineConfig,
        comm: Communicator,
        num_blocks: tuple[int, ...],
        kv_cache_dtype: str = KV_CACHE_DTYPES[0],
    ) -> None:
        self.config, self.comm, self.num_passes = config, comm, 0
        self.mapping = config.mapping.for_rank(comm.rank)
        checkpoint, limits = config.checkpoint, config.limits
        tensors = map_tensors(folder / engine_file(comm.rank), config, comm.rank)
        self.weights = _load(tensors, config, comm.rank)
        self.cache = make_cache(
            checkpoint.model,
            self.mapping,
            num_blocks=num_blocks,
            num_slots=limits.max_batch_size,
            max_seq_len=limits.max_seq_len,
            dtype=cache_type(kv_cache_dtype, checkpoint.torch_dtype),
        )
        self.program = compile_program(checkpoint.model, self.mapping, self.weights, self.cache, limits.max_num_tokens)
        """Few calls per step; None, or too small for a step of many tokens, leaves it to the PyTorch lowering."""

    @torch.inference_mode()
    def forward(self, batch: StepBatch) -> Logits | None:
        """The logits on rank 0, nothing elsewhere."""
        self.num_passes += 1
        graph = TorchGraph(self.weights, self.cache, self.comm, batch, self.mapping.tracks_per_rank)
        if self.program is not None and batch.num_tokens <= self.program.capacity:
            gathered = self.program.run(graph)
        else:
            gathered = pt_decoder(graph, self.config.checkpoint.model, self.mapping)
        if self.comm.rank:
            return None
        return unpack(gathered, batch, head_rows=self.weights.head_rows, vocab_size=self.weights.vocab_size)

    def close(self) -> None:
        return


def open_engine(
    folder: Path,
    config: EngineConfig,
    comm: Communicator,
    num_blocks: tuple[int, ...],
    kv_cache_dtype: str = KV_CACHE_DTYPES[0],
) -> CpuEngine:
    """Opens this rank's file, with a KV cache of `num_blocks` blocks for each of the model's `kv_groups`."""
    return CpuEngine(folder, config, comm, num_blocks, kv_cache_dtype)


def map_tensors(path: Path, config: EngineConfig, rank: int) -> dict[str, torch.Tensor]:
    """The tensors of an engine file, mapped (private, lazily read), after its plan was checked."""
    infos, metadata = read_header(path)
    if metadata.get("format") != FORMAT:
        raise EngineError(f"{path}: format {metadata.get('format')!r}, expected {FORMAT!r}; build the engine again")
    try:
        plan = json.loads(metadata.get("plan", "null"))
    except (ValueError, RecursionError):
        plan = None
    if not isinstance(plan, dict) or plan.get("rank") != rank or plan.get("config") != config.to_json():
        raise EngineError(f"{path}: its plan does not belong to this folder's config.json; build the engine again")
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
            linears[spec.name] = _linear(spec, tensors, checkpoint.torch_dtype)
        else:
            experts[spec.name] = _experts(spec, tensors, checkpoint.torch_dtype, mapping.tracks_per_rank)
    shard = mapping.vocab_shard(model.vocab_size)
    head = plain[EMBEDDING][shard.start : shard.stop] if model.tie_word_embeddings else plain[OUTPUT_PROJECTION]
    return RankWeights(
        tensors=plain,
        linears=linears,
        experts=experts,
        rope=rope_tables(model, config.limits.max_seq_len),
        rope_style=model.rope_style,
        head=make_linear(head[None]),
        head_rows=len(shard),
        vocab_size=model.vocab_size,
    )


def _linear(
    spec: TensorSpec, tensors: dict[str, torch.Tensor], dtype: torch.dtype, track: int | None = None, expert: int = 0
) -> Linear:
    """All local tracks of a weight as one linear, or one expert of one track."""
    found = {part: tensors.get(spec.name.removesuffix("weight") + part) for part in ("weight", *SCALES)}
    parts = {
        part: values if track is None else values[track, expert][None]
        for part, values in found.items()
        if values is not None
    }
    if parts["weight"].dtype == E4M3:
        return make_linear(dequantize(parts).to(dtype))
    scale = parts.get("weights_scaling_factor", parts.get("per_channel_scale"))
    return make_linear(parts["weight"], scale, parts.get("zero"))


def _experts(
    spec: TensorSpec, tensors: dict[str, torch.Tensor], dtype: torch.dtype, num_tracks: int
) -> list[list[Linear]]:
    """[track][expert]: every expert is a linear of its own; tensors are [tracks, experts, ...]."""
    return [
        [_linear(spec, tensors, dtype, track, expert) for expert in range(spec.shape[0])] for track in range(num_tracks)
    ]
