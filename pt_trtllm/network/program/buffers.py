"""Memory for the values of a program: a value's buffer is used again once nobody reads the value any more."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pt_trtllm.network.program.ops import Op, Value


class Buffers:
    """Room for `capacity` tokens; the first tokens of every track are a step's."""

    def __init__(self, ops: Sequence[Op], capacity: int, dtype: torch.dtype) -> None:
        self._memory: dict[Value, torch.Tensor] = {}
        last_use = {value.owner: at for at, op in enumerate(ops) for value in (*op.inputs, op.out) if value is not None}
        free: list[torch.Tensor] = []
        for at, op in enumerate(ops):
            if op.out is not None:
                shape = (op.out.tracks or 1, capacity, op.out.width)
                reused = next((buffer for buffer in free if buffer.shape == shape), None)
                if reused is not None:
                    free = [buffer for buffer in free if buffer is not reused]
                self._memory[op.out] = torch.empty(shape, dtype=dtype) if reused is None else reused
            # Only now: an operation's output never overlaps its inputs.
            ended = {value.owner for value in (*op.inputs, op.out) if value is not None and last_use[value.owner] == at}
            free += [self._memory[value] for value in ended]

    def of(self, value: Value) -> torch.Tensor:
        """[tracks, capacity, width]; tracks that share one value overlap."""
        memory = self._memory[value.owner]
        return memory if value.repeats is None else memory.expand(value.tracks or 1, -1, -1)

    def view(self, value: Value, num_tokens: int) -> torch.Tensor:
        """The step's part, in the shape that `Graph` names."""
        used = self.of(value)[:, :num_tokens]
        return used[0] if value.tracks is None else used
