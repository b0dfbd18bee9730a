"""What rank 0 tells the other ranks: one small typed message per step, and one to stop."""

from __future__ import annotations

from array import array

from pt_trtllm.network.step import SequenceSlice, StepBatch, int64_tensor

STOP = b""
HEAD_FIELDS, SLICE_FIELDS = 4, 6


def encode(batch: StepBatch, engine: int = 0) -> bytes:
    """int32: engine; counts; sequences; tokens; rows; top k; blocks.

    A sequence is slot, new tokens, past, first block, groups of blocks, blocks of each group. Plain lists: for some
    dozens of numbers they take a fraction of the time that tensors do.
    """
    tokens, rows = batch.token_ids.tolist(), batch.logit_rows.tolist()
    values = [engine, len(batch.sequences), len(tokens), len(rows)]
    for s in batch.sequences:
        groups = s.blocks
        values += (s.slot, s.num_tokens, s.past, s.first_block, len(groups), len(groups[0]) if groups else 0)
    values += tokens
    values += rows
    values += batch.row_top_k
    for s in batch.sequences:
        for group in s.blocks:
            values += group
    return array("i", values).tobytes()


def decode(message: bytes) -> tuple[int, StepBatch] | None:
    """(which of the engines on these ranks, its step); None means stop."""
    if message == STOP:
        return None
    values = array("i", message).tolist()
    engine, num_sequences, num_tokens, num_rows = values[:HEAD_FIELDS]
    first = HEAD_FIELDS + SLICE_FIELDS * num_sequences
    rows = first + num_tokens
    top_k = rows + num_rows
    at = top_k + num_rows
    sequences = []
    for begin in range(HEAD_FIELDS, first, SLICE_FIELDS):
        slot, new, past, first_block, groups, count = values[begin : begin + SLICE_FIELDS]
        blocks = tuple(tuple(values[at + count * group : at + count * (group + 1)]) for group in range(groups))
        at += groups * count
        sequences.append(SequenceSlice(slot=slot, num_tokens=new, past=past, first_block=first_block, blocks=blocks))
    batch = StepBatch(
        token_ids=int64_tensor(values[first:rows]),
        sequences=tuple(sequences),
        logit_rows=int64_tensor(values[rows:top_k]),
        row_top_k=tuple(values[top_k : top_k + num_rows]),
    )
    return engine, batch
