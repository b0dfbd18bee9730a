"""What rank 0 tells the other ranks: one small typed message per step, and one to stop."""

from __future__ import annotations

import numpy as np
import torch

from pt_trtllm.network.torch_ops import SequenceSlice, StepBatch

STOP = b""


def encode(batch: StepBatch) -> bytes:
    """int32: counts of sequences, tokens and rows; then (slot, new, past) per sequence; tokens; rows."""
    slices = [(s.slot, s.num_tokens, s.past) for s in batch.sequences]
    head = [len(slices), len(batch.token_ids), len(batch.logit_rows)]
    parts = [np.array(head), np.array(slices).reshape(-1), batch.token_ids.numpy(), batch.logit_rows.numpy()]
    message: bytes = np.concatenate(parts).astype(np.int32).tobytes()
    return message


def decode(message: bytes) -> StepBatch | None:
    """The inverse; None means stop."""
    if message == STOP:
        return None
    values = torch.from_numpy(np.frombuffer(message, dtype=np.int32).astype(np.int64))
    num_sequences, num_tokens, num_rows = values[:3].tolist()
    slices, tokens, rows = values[3:].split([3 * num_sequences, num_tokens, num_rows])
    return StepBatch(
        token_ids=tokens,
        sequences=tuple(SequenceSlice(slot=s, num_tokens=n, past=p) for s, n, p in slices.view(-1, 3).tolist()),
        logit_rows=rows,
    )
