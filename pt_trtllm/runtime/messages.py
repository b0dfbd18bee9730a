"""What rank 0 tells the other ranks: one small typed message per step, and one to stop."""

from __future__ import annotations

import numpy as np
import torch

from pt_trtllm.network.step import SequenceSlice, StepBatch

STOP = b""
HEAD_FIELDS, SLICE_FIELDS = 4, 6


def encode(batch: StepBatch, engine: int = 0) -> bytes:
    """int32: engine; counts; sequences; tokens; rows; top k; blocks.

    A sequence is slot, new tokens, past, first block, groups of blocks, blocks of each group.
    """
    head = [engine, len(batch.sequences), len(batch.token_ids), len(batch.logit_rows)]
    slices = [
        [s.slot, s.num_tokens, s.past, s.first_block, len(s.blocks), len(s.blocks[0]) if s.blocks else 0]
        for s in batch.sequences
    ]
    blocks = [block for s in batch.sequences for group in s.blocks for block in group]
    parts = [np.array(head), np.array(slices).reshape(-1), batch.token_ids.numpy()]
    parts += [batch.logit_rows.numpy(), np.array(batch.row_top_k, dtype=np.int64)]
    message: bytes = np.concatenate([*parts, np.array(blocks, dtype=np.int64)]).astype(np.int32).tobytes()
    return message


def decode(message: bytes) -> tuple[int, StepBatch] | None:
    """(which of the engines on these ranks, its step); None means stop."""
    if message == STOP:
        return None
    values = torch.from_numpy(np.frombuffer(message, dtype=np.int32).astype(np.int64))
    engine, num_sequences, num_tokens, num_rows = values[:HEAD_FIELDS].tolist()
    first = HEAD_FIELDS + SLICE_FIELDS * num_sequences
    slices = values[HEAD_FIELDS:first].view(-1, SLICE_FIELDS).tolist()
    num_blocks = sum(row[4] * row[5] for row in slices)
    sizes = [num_tokens, num_rows, num_rows, num_blocks]
    tokens, rows, top_k, flat = values[first:].split(sizes)
    blocks = iter(flat.tolist())
    batch = StepBatch(
        token_ids=tokens,
        sequences=tuple(
            SequenceSlice(
                slot=slot,
                num_tokens=new,
                past=past,
                first_block=first_block,
                blocks=tuple(tuple(next(blocks) for _ in range(count)) for _ in range(groups)),
            )
            for slot, new, past, first_block, groups, count in slices
        ),
        logit_rows=rows,
        row_top_k=tuple(top_k.tolist()),
    )
    return engine, batch
