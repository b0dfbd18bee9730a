"""The decoder of one rank, ready to run: lists of kernels, and the calls of the PyTorch lowering between them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from pt_trtllm.checkpoint.spec import EMBEDDING
from pt_trtllm.config import ModelConfig
from pt_trtllm.errors import EngineError
from pt_trtllm.mapping import Mapping
from pt_trtllm.network.decoder import pt_decoder
from pt_trtllm.network.kv_cache import KvCache, NativeKvCache
from pt_trtllm.network.program.buffers import Buffers
from pt_trtllm.network.program.library import KIND_OF, KINDS, OpEntry, Step, Work, load_library
from pt_trtllm.network.program.lower import Lowering
from pt_trtllm.network.program.ops import Call
from pt_trtllm.network.program.record import ProgramGraph
from pt_trtllm.network.torch_linear import GEMM_MIN_ROWS, StreamedLinear, has_fast_gemm
from pt_trtllm.network.torch_ops import RankWeights, TorchGraph


class KernelList:
    """Operations without a collective between them: one call into the library."""

    def __init__(self, works: Sequence[Work]) -> None:
        self._works = list(works)  # the entries point to them
        self._count = len(self._works)
        self._entries = (OpEntry * self._count)(
            *(OpEntry(KIND_OF[type(work)], ctypes.addressof(work)) for work in self._works)
        )

    def run(self, library: ctypes.CDLL, step: ctypes.Structure, seconds: ctypes.Array[ctypes.c_double]) -> None:
        if library.pt_program_run(self._entries, self._count, ctypes.addressof(step), seconds):
            raise EngineError(library.pt_program_last_error().decode(errors="replace"))


class BoundCall:
    """A call of the PyTorch lowering on views of the buffers, made for one number of tokens."""

    def __init__(self, op: Call) -> None:
        self.op = op
        self.inputs: list[torch.Tensor] = []
        self.out: torch.Tensor | None = None

    def run(self, graph: TorchGraph) -> torch.Tensor:
        result: torch.Tensor = getattr(graph, self.op.name)(*self.inputs, *self.op.arguments)
        return result if self.out is None else self.out.copy_(result)


class Program:
    """Does what `pt_decoder` over `TorchGraph` does, for steps of up to `capacity` tokens."""

    def __init__(
        self, config: ModelConfig, mapping: Mapping, weights: RankWeights, cache: NativeKvCache, capacity: int
    ) -> None:
        graph = ProgramGraph(weights, mapping.tracks_per_rank)
        pt_decoder(graph, config, mapping)
        self.capacity, self._cache = capacity, cache
        self._buffers = Buffers(graph.ops, capacity, weights.tensors[EMBEDDING].dtype)
        self._weights = weights  # the kernels point into them
        self._library = load_library()
        self._seconds = (ctypes.c_double * len(KINDS))()
        self._parts: list[KernelList | BoundCall] = []
        self._bound_tokens = -1
        lowering, works = Lowering(weights, self._buffers, cache), list[Work]()
        for op in graph.ops:
            if not isinstance(op, Call):
                works += lowering.lower(op)
                continue
            if works:
                self._parts.append(KernelList(works))
                works = []
            self._parts.append(BoundCall(op))
        self._calls = [part for part in self._parts if isinstance(part, BoundCall)]

    def run(self, graph: TorchGraph) -> torch.Tensor:
        """The logits, as `graph.logits` gives them. `graph` has begun the step."""
        token_ids = graph.batch.token_ids
        num_tokens = len(token_ids)
        ragged = self._cache.ragged
        batches = (ctypes.c_void_p * len(ragged))(*(batch.address for batch in ragged))
        step = Step(token_ids.data_ptr(), ctypes.addressof(batches), len(ragged), torch.get_num_threads())
        if num_tokens != self._bound_tokens:  # decoding, it seldom changes
            self._bind(num_tokens)
        result = token_ids
        for part in self._parts:
            if isinstance(part, KernelList):
                part.run(self._library, step, self._seconds)
                continue
            result = part.run(graph)
        return result

    @property
    def num_calls(self) -> int:
        """Of a step: into the kernel libraries and into the PyTorch lowering."""
        return len(self._parts)

    def kernel_seconds(self) -> dict[str, float]:
        """Time in kernels since the engine was opened, by kind."""
        return dict(zip(KINDS, self._seconds, strict=True))

    def _bind(self, num_tokens: int) -> None:
        """Makes the calls' views of the buffers."""
        for call in self._calls:
            call.inputs = [self._buffers.view(value, num_tokens) for value in call.op.inputs]
            call.out = None if call.op.out is None else self._buffers.view(call.op.out, num_tokens)
        self._bound_tokens = num_tokens


def compile_program(
    config: ModelConfig, mapping: Mapping, weights: RankWeights, cache: KvCache, max_num_tokens: int
) -> Program | None:
    """None where a part of the model has no kernel, so that every step takes the PyTorch lowering."""
    streamed = all(isinstance(linear, StreamedLinear) for linear in weights.linears.values())
    if not streamed or not isinstance(cache, NativeKvCache):
        return None
    # For more rows a GEMM is ahead where the processor has one for the type: the PyTorch lowering calls it.
    fast_gemm = has_fast_gemm(weights.tensors[EMBEDDING].dtype)
    capacity = min(max_num_tokens, GEMM_MIN_ROWS - 1) if fast_gemm else max_num_tokens
    return Program(config, mapping, weights, cache, capacity)
