"""One rank's TensorRT engine on its GPU: the runtime's steps over execution contexts.

Thin on purpose: what a step means is decided in `passes`, which needs no GPU. Not run yet on a GPU: see
docs/engines.md.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from pt_trtllm import env
from pt_trtllm.checkpoint.artifact import verify_file
from pt_trtllm.comm.base import Communicator
from pt_trtllm.engine.bundle import EngineConfig, engine_file, open_bundle
from pt_trtllm.engine.tensorrt.bindings import PROFILES, Binding, bindings, cache_capacity
from pt_trtllm.engine.tensorrt.gpu import present_gpu
from pt_trtllm.engine.tensorrt.library import Library
from pt_trtllm.engine.tensorrt.messages import Messages, make_logger
from pt_trtllm.engine.tensorrt.nccl import NcclCommunicator
from pt_trtllm.engine.tensorrt.passes import Pass, plan_passes
from pt_trtllm.engine.tensorrt.settings import TensorrtSettings
from pt_trtllm.errors import EngineError
from pt_trtllm.mapping import sync_counts, sync_plan
from pt_trtllm.network.logits import Logits
from pt_trtllm.network.step import StepBatch


class TensorrtEngine:
    """Implements the runtime's `Engine`: `forward` runs a step on this rank's GPU, in step with the other ranks'."""

    shares_blocks = False
    """Every slot has a cache row of its own: prefixes are not shared."""

    def __init__(self, engine: Any, library: Library, config: EngineConfig, comm: Communicator, cache: Path) -> None:
        self.config, self.comm, self.num_passes = config, comm, 0
        self._engine, self._library, self._runtime_cache_path = engine, library, cache
        model, limits, mapping = config.checkpoint.model, config.limits, config.mapping.for_rank(comm.rank)
        self._settings = TensorrtSettings.from_json(config.backend_config, "config.json")
        self._bindings = bindings(
            model, mapping, limits, config.checkpoint.dtype, context_logits=self._settings.gather_context_logits
        )
        self._capacity = cache_capacity(limits)
        self._counts = sync_counts(sync_plan(model, mapping))
        self._stream = torch.cuda.Stream()
        self._buffers = {b.name: _buffer(b) for b in self._bindings if b.aliases is None}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._warm: set[int] = set()
        self._runtime_config = self._configure()
        self._contexts = [self._context(index) for index in range(len(PROFILES))]
        self._nccl = NcclCommunicator(comm) if comm.world_size > 1 else None
        if self._nccl is not None:
            for context in self._contexts:  # collective calls: every rank makes them in this order
                if not context.set_communicator(self._nccl.capsule()):
                    raise EngineError(f"rank {comm.rank}: TensorRT refused the NCCL communicator")

    @classmethod
    def open(cls, folder: Path, config: EngineConfig, comm: Communicator) -> TensorrtEngine:
        """Checks version, GPU and digest before anything is loaded."""
        settings = TensorrtSettings.from_json(config.backend_config, str(folder / "config.json"))
        library = settings.check_version()
        settings.check_gpu(present_gpu())
        if not torch.cuda.is_available():
            raise EngineError(
                f"the TensorRT executor needs PyTorch with CUDA, {torch.__version__} has none: install torch "
                f"{torch.__version__.split('+')[0]} from PyTorch's CUDA index"
            )
        verify_file(folder, engine_file(comm.rank), open_bundle(folder)[1])
        torch.cuda.set_device(_local_rank(comm.rank) % torch.cuda.device_count())
        messages = Messages(lambda text: print(f"TensorRT warning: {text}", flush=True))
        runtime = library.module.Runtime(make_logger(library, messages))
        engine = runtime.deserialize_cuda_engine((folder / engine_file(comm.rank)).read_bytes())
        if engine is None:
            raise EngineError(f"{folder / engine_file(comm.rank)} cannot be loaded: {messages.summary()}")
        target = torch.cuda.get_device_capability()
        name = f"runtime-{library.name}-{library.version}-sm{target[0]}{target[1]}-rank{comm.rank}.cache"
        return cls(engine, library, config, comm, Path(env.CACHE_DIR.get()).expanduser() / "tensorrt" / name)

    def forward(self, batch: StepBatch) -> Logits | None:
        """The logits on rank 0, nothing elsewhere: the engine gathers whole rows on every rank."""
        passes = plan_passes(
            batch,
            self.config.limits.max_batch_size,
            self._capacity,
            context_logits=self._settings.gather_context_logits,
        )
        rows = len(batch.logit_rows)
        output = torch.empty(rows if self.comm.rank == 0 else 0, self.config.checkpoint.model.vocab_size)
        for planned in passes:
            logits = self._run(planned)
            if self.comm.rank == 0 and planned.take:
                source, target = (torch.tensor(rows) for rows in zip(*planned.take, strict=True))
                output[target] = logits[source.to(logits.device)].cpu()
        return Logits.whole(output) if self.comm.rank == 0 else None

    def close(self) -> None:
        """Keeps what TensorRT-RTX compiled for this GPU, and leaves the communicator."""
        self._keep_runtime_cache()
        self._graphs.clear()
        self._contexts.clear()
        if self._nccl is not None:
            self._nccl.close()

    def _run(self, planned: Pass) -> torch.Tensor:
        """Executes a pass; the logits stay on the GPU."""
        context, key = self._contexts[planned.profile], planned.graph_key
        with torch.cuda.stream(self._stream):
            for name, values in planned.inputs().items():
                self._buffers[name][: values.numel()].copy_(values.flatten(), non_blocking=True)
            graph = None if key is None else self._graphs.get(key)
            if graph is not None:
                graph.replay()
            else:
                self._bind(context, planned)
                if key in self._warm and not self._library.targets:
                    self._graphs[key] = self._record(context)
                self._execute(context)
                if key is not None:
                    self._warm.add(key)
        self._stream.synchronize()
        self.num_passes += 1
        for kind, count in self._counts.items():
            self.comm.stats.counts[kind] += count
        rows, vocab = len(planned.logit_rows), self.config.checkpoint.model.vocab_size
        return self._buffers["logits"][: rows * vocab].view(rows, vocab)

    def _bind(self, context: Any, planned: Pass) -> None:
        """Shapes and addresses: caches from the pass's first row on, everything else from the start."""
        inputs = planned.inputs()
        for binding in self._bindings:
            buffer = self._buffers[binding.aliases or binding.name]
            address = buffer.data_ptr()
            if binding.name.startswith(("past_", "present_")):
                row_bytes = buffer[0].numel() * buffer.element_size()
                address += planned.first_row * row_bytes
                shape = (planned.batch_size, *buffer.shape[1:])
            elif binding.is_input:
                shape = tuple(inputs[binding.name].shape)
            if binding.is_input and not context.set_input_shape(binding.name, shape):
                raise EngineError(f"{binding.name}: TensorRT refused the shape {list(shape)}")
            context.set_tensor_address(binding.name, address)

    def _execute(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise EngineError(f"rank {self.comm.rank}: TensorRT could not run a step; its messages are in the log")

    def _record(self, context: Any) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self._execute(context)
        return graph

    def _context(self, profile: int) -> Any:
        if self._runtime_config is not None:
            context = self._engine.create_execution_context(self._runtime_config)
        else:
            context = self._engine.create_execution_context()
        if context is None or not context.set_optimization_profile_async(profile, self._stream.cuda_stream):
            raise EngineError(
                f"rank {self.comm.rank}: no execution context for the {PROFILES[profile]} profile: GPU memory may not "
                "suffice; build with a smaller --max-batch-size or --max-seq-len"
            )
        self._stream.synchronize()
        return context

    def _configure(self) -> Any | None:
        """TensorRT-RTX compiles kernels on the GPU it meets, and records CUDA graphs itself when they are ready."""
        if not self._library.targets:
            return None
        trt, config = self._library.module, self._engine.create_runtime_config()
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        cache = config.create_runtime_cache()
        if self._runtime_cache_path.is_file():
            cache.deserialize(self._runtime_cache_path.read_bytes())
        config.set_runtime_cache(cache)
        return config

    def _keep_runtime_cache(self) -> None:
        if self._runtime_config is None:
            return
        path = self._runtime_cache_path
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(self._runtime_config.get_runtime_cache().serialize())
        temporary.replace(path)


def _buffer(binding: Binding) -> torch.Tensor:
    """Memory for a tensor's largest shape. Caches start as zeros: masked positions must still hold finite numbers."""
    largest = [binding.shapes(profile)[2] for profile in range(len(PROFILES))]
    dtype = getattr(torch, binding.dtype)
    if binding.name.startswith("past_"):
        return torch.zeros(largest[1], dtype=dtype, device="cuda")
    return torch.empty(max(torch.Size(shape).numel() for shape in largest), dtype=dtype, device="cuda")


def _local_rank(rank: int) -> int:
    """The rank's number on its host, as the launcher says."""
    for name in ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"):
        if name in os.environ:
            return int(os.environ[name])
    return rank
