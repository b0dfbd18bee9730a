"""A step of the runtime as executions of the engine: what goes into every tensor, without a GPU.

The runtime lays the new tokens of several sequences end to end. An engine has one linear cache row per slot, so each
prompt's chunk is an execution of the context profile on its slot's row, and all sequences that add one token are one
execution of the generation profile over the rows 0 to the last used one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pt_trtllm.engine.tensorrt.bindings import CONTEXT, GENERATION
from pt_trtllm.errors import EngineError
from pt_trtllm.network.step import SequenceSlice, StepBatch


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One execution. All tensors are int32, on the CPU."""

    profile: int
    first_row: int
    """Where in the cache its rows start: the slot of a context pass, 0 of a generation pass."""
    input_ids: torch.Tensor
    """[batch, tokens]"""
    position_ids: torch.Tensor
    cache_write_indices: torch.Tensor
    """[batch]"""
    key_value_lengths: torch.Tensor
    logit_rows: torch.Tensor
    take: tuple[tuple[int, int], ...]
    """(row of this pass's logits, row of the step's)"""

    @property
    def batch_size(self) -> int:
        return self.input_ids.shape[0]

    @property
    def graph_key(self) -> int | None:
        """Passes with the same key have the same shapes and addresses: they share a CUDA graph. None: record none."""
        return self.batch_size if self.profile == GENERATION else None

    def inputs(self) -> dict[str, torch.Tensor]:
        names = ("input_ids", "position_ids", "cache_write_indices", "key_value_lengths", "logit_rows")
        return {name: getattr(self, name) for name in names}


def batch_buckets(max_batch_size: int) -> tuple[int, ...]:
    """Batch sizes that generation passes are rounded up to: few, so that few CUDA graphs are recorded."""
    sizes = [size for size in (1, 2, 4, 8, 16, 24, 32, 48) if size < max_batch_size]
    return (*sizes, *range(64, max_batch_size, 64), max_batch_size)


def plan_passes(batch: StepBatch, max_batch_size: int, capacity: int, *, context_logits: bool) -> list[Pass]:
    """Generation first: running sequences do not wait for prompts."""
    starts, first = [], 0
    for piece in batch.sequences:
        starts.append(first)
        first += piece.num_tokens
    wanted = {token: row for row, token in enumerate(batch.logit_rows.tolist())}
    pieces = list(zip(batch.sequences, starts, strict=True))
    singles = [(piece, start) for piece, start in pieces if piece.num_tokens == 1]
    chunks = [(piece, start) for piece, start in pieces if piece.num_tokens > 1]
    passes = [_generation(batch, singles, wanted, max_batch_size, capacity)] if singles else []
    return passes + [_context(batch, piece, start, wanted, context_logits) for piece, start in chunks]


def _generation(
    batch: StepBatch,
    singles: Sequence[tuple[SequenceSlice, int]],
    wanted: dict[int, int],
    max_batch_size: int,
    capacity: int,
) -> Pass:
    """Rows of slots that take no part write to the last position of their cache, which no sequence reaches."""
    last = max(piece.slot for piece, _ in singles)
    size = next(bucket for bucket in batch_buckets(max_batch_size) if bucket > last)
    ids, positions = torch.zeros(size, 1, dtype=torch.int32), torch.zeros(size, 1, dtype=torch.int32)
    writes = torch.full((size,), capacity - 1, dtype=torch.int32)
    lengths = torch.ones(size, dtype=torch.int32)
    take = []
    for piece, start in singles:
        ids[piece.slot, 0] = batch.token_ids[start]
        positions[piece.slot, 0] = writes[piece.slot] = piece.past
        lengths[piece.slot] = piece.past + 1
        if start in wanted:
            take.append((piece.slot, wanted[start]))
    return Pass(
        profile=GENERATION,
        first_row=0,
        input_ids=ids,
        position_ids=positions,
        cache_write_indices=writes,
        key_value_lengths=lengths,
        logit_rows=torch.arange(size, dtype=torch.int32),
        take=tuple(take),
    )


def _context(batch: StepBatch, piece: SequenceSlice, start: int, wanted: dict[int, int], context_logits: bool) -> Pass:
    tokens = range(start, start + piece.num_tokens)
    rows = [token - start for token in tokens if token in wanted]
    if len(rows) > 1 and not context_logits:
        raise EngineError(
            f"the logits of {len(rows)} tokens of a prompt were asked for; this engine gives those of one: "
            "build it with --gather-context-logits"
        )
    return Pass(
        profile=CONTEXT,
        first_row=piece.slot,
        input_ids=batch.token_ids[tokens.start : tokens.stop].to(torch.int32)[None],
        position_ids=torch.arange(piece.past, piece.past + piece.num_tokens, dtype=torch.int32)[None],
        cache_write_indices=torch.tensor([piece.past], dtype=torch.int32),
        key_value_lengths=torch.tensor([piece.past + piece.num_tokens], dtype=torch.int32),
        logit_rows=torch.tensor(rows or [piece.num_tokens - 1], dtype=torch.int32),
        take=tuple((index, wanted[start + row]) for index, row in enumerate(rows)),
    )
