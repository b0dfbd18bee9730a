"""Sums between hosts: one leader per host, MPI between them, encoded on the way when a codec is on."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pt_trtllm.comm.coding import Coding, decode, encode, encoded_bytes

Wait = Callable[[Any], None]
"""Waits for an MPI request, with a time limit and a message of its owner's."""

TWO_SHOT_HOSTS, TWO_SHOT_BYTES = 3, 64 * 1024
"""What `auto` means between hosts: the rule of the shared-memory group."""


def sum_over_hosts(leaders: Any, total: torch.Tensor, coding: Coding, wait: Wait) -> torch.Tensor:
    """float32 [rows, hidden] of every leader, added in the order of hosts: the same bits on each of them."""
    if coding.codec == "none":
        sums = torch.empty((leaders.size, *total.shape))
        wait(leaders.Iallgather(total.numpy(), sums.numpy()))
        return _in_order(list(sums))
    large = leaders.size >= TWO_SHOT_HOSTS and total.nbytes >= TWO_SHOT_BYTES
    if coding.algorithm == "two_shot" or (coding.algorithm == "auto" and large):
        return _two_shot(leaders, total, coding.codec, wait)
    return _one_shot(leaders, total, coding.codec, wait)


def _one_shot(leaders: Any, total: torch.Tensor, codec: str, wait: Wait) -> torch.Tensor:
    mine = encode(codec, total)
    everyone = torch.empty((leaders.size, mine.numel()), dtype=torch.uint8)
    wait(leaders.Iallgather(mine.numpy(), everyone.numpy()))
    return _in_order([decode(codec, message, *total.shape) for message in everyone])


def _two_shot(leaders: Any, total: torch.Tensor, codec: str, wait: Wait) -> torch.Tensor:
    """Each leader adds up some of the rows for all, and encodes the sums again."""
    hidden = total.shape[1]
    shards = total.tensor_split(leaders.size)
    own_rows = len(shards[leaders.rank])
    counts = [encoded_bytes(codec, len(shard), hidden) for shard in shards]
    sent = torch.cat([encode(codec, shard) for shard in shards])
    received = torch.empty((leaders.size, counts[leaders.rank]), dtype=torch.uint8)
    wait(leaders.Ialltoallv([sent.numpy(), counts], [received.numpy(), [counts[leaders.rank]] * leaders.size]))
    mine = encode(codec, _in_order([decode(codec, message, own_rows, hidden) for message in received]))
    everyone = torch.empty(sum(counts), dtype=torch.uint8)
    wait(leaders.Iallgatherv(mine.numpy(), [everyone.numpy(), counts]))
    parts = zip(everyone.split(counts), shards, strict=True)
    return torch.cat([decode(codec, message, len(shard), hidden) for message, shard in parts])


def _in_order(terms: list[torch.Tensor]) -> torch.Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
