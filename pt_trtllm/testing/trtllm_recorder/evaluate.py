"""Computes recorded networks of all ranks in lock step, with the KV cache that the attention plugin would keep."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from pt_trtllm.testing.trtllm_recorder.functional import PositionEmbeddingType
from pt_trtllm.testing.trtllm_recorder.network import Network, Node

Value = torch.Tensor
Meeting = tuple[str, tuple[int, ...], int, Value]
"""Operation, group, axis, and this rank's part."""
Caches = dict[tuple[int, int], tuple[Value, Value]]
"""(layer, sequence) -> keys and values so far, [heads, tokens, head]"""

SIMPLE: dict[str, Callable[..., Value]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "linear": functional.linear,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "embedding": lambda index, table: table[index.long()],
}


@dataclass(frozen=True)
class Step:
    """New tokens of some sequences, packed one after another."""

    sequences: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]
    past: tuple[int, ...]

    def inputs(self) -> dict[str, Value]:
        positions = [range(p, p + len(t)) for p, t in zip(self.past, self.tokens, strict=True)]
        return {
            "input_ids": torch.tensor([token for tokens in self.tokens for token in tokens]),
            "position_ids": torch.tensor([position for part in positions for position in part]),
        }


@dataclass
class RecordedWorld:
    networks: Sequence[Network]
    windows: Sequence[int]
    """`max_attention_window` of every layer, which a run takes from the engine's defaults."""
    caches: list[Caches] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.caches = [{} for _ in self.networks]

    def logits(self, step: Step) -> list[Value]:
        """Every rank's logits, [tokens, padded vocabulary]."""
        walks = [
            _Rank(network, self.windows, caches, step).walk()
            for network, caches in zip(self.networks, self.caches, strict=True)
        ]
        results: dict[int, Value] = {}
        sent: dict[int, Any] = dict.fromkeys(range(len(walks)))
        waiting: dict[int, Meeting] = {}
        while len(results) < len(walks):
            for rank, value in sent.items():
                try:
                    waiting[rank] = walks[rank].send(value)
                except StopIteration as ended:
                    results[rank] = ended.value
            sent = _meet(waiting)
            for rank in sent:
                del waiting[rank]
        return [results[rank] for rank in range(len(walks))]


def _meet(waiting: dict[int, Meeting]) -> dict[int, Any]:
    done: dict[int, Any] = {}
    for rank, (op, group, axis, _) in waiting.items():
        assert rank in group, f"rank {rank} joins a collective of {group}"
        if rank not in done and all(peer in waiting and waiting[peer][:3] == (op, group, axis) for peer in group):
            parts = [waiting[peer][3] for peer in group]
            result = torch.stack(parts).sum(0) if op == "allreduce" else torch.cat(parts, dim=axis)
            done.update(dict.fromkeys(group, result))
    assert done or not waiting, f"ranks wait for each other: { {r: w[:2] for r, w in waiting.items()} }"
    return done


class _Rank:
    def __init__(self, network: Network, windows: Sequence[int], caches: Caches, step: Step) -> None:
        self._network, self._windows, self._caches, self._step = network, windows, caches, step

    def walk(self) -> Generator[Meeting, Value, Value]:
        values: dict[tuple[int, int], Value] = {}
        for node in self._network.nodes:
            inputs = [None if t is None else values[id(t.node), t.output] for t in node.inputs]
            if node.op in ("allreduce", "allgather"):
                group, axis = tuple(node.attributes["group"]), node.attributes.get("dim", 0)
                results = [(yield node.op, group, axis, inputs[0])]  # type: ignore[misc]
            else:
                results = self._compute(node, inputs)
            values.update({(id(node), index): result for index, result in enumerate(results)})
        logits = self._network.outputs["logits"]
        return values[id(logits.node), logits.output]

    def _compute(self, node: Node, inputs: list[Any]) -> list[Value]:
        given = node.attributes
        if node.op in SIMPLE:
            return [SIMPLE[node.op](*inputs)]
        if node.op == "input":
            return [self._step.inputs()[given["name"]]]
        if node.op == "parameter":
            assert given["parameter"].is_inited()
            return [given["parameter"].raw_value.float()]
        if node.op == "constant":
            return [given["value"]]
        if node.op == "cast":  # everything is computed in float32
            return [inputs[0]]
        if node.op == "mul_scalar":
            return [inputs[0] * given["value"]]
        if node.op == "shape":
            return [torch.tensor(inputs[0].shape[given["dim"]])]
        if node.op == "sizes":
            sizes = iter(inputs)
            return [torch.tensor([int(next(sizes)) if size is None else size for size in given["static"]])]
        if node.op == "view":
            return [inputs[0].reshape(inputs[1].tolist())]
        if node.op == "concat":
            return [torch.cat(inputs, dim=given["dim"])]
        if node.op == "split":
            return list(inputs[0].split(given["sections"], dim=given["dim"]))
        if node.op == "unsqueeze":
            return [inputs[0].unsqueeze(given["axis"])]
        if node.op == "rms_norm":
            y = inputs[0] * torch.rsqrt(inputs[0].square().mean(-1, keepdim=True) + given["eps"])
            return [y if inputs[1] is None else y * inputs[1]]
        if node.op == "experts":
            return [_experts(inputs, given["top_k"])]
        if node.op == "attention":
            return [self._attention(inputs[0], given)]
        raise NotImplementedError(node.op)

    def _attention(self, qkv: Value, given: dict[str, Any]) -> Value:
        heads, kv_heads, size = given["heads"], given["kv_heads"], given["head_size"]
        outputs, parts = [], qkv.split([len(tokens) for tokens in self._step.tokens])
        for sequence, past, part in zip(self._step.sequences, self._step.past, parts, strict=True):
            by_head = part.reshape(len(part), -1, size).transpose(0, 1)
            query, key, value = by_head.split([heads, kv_heads, kv_heads])
            if given["rotation"].is_rope():
                query, key = (_rotate(x, past, given) for x in (query, key))
            at = (given["layer_idx"], sequence)
            old = self._caches.get(at, (key[:, :0], value[:, :0]))
            assert old[0].shape[1] == past, f"layer {at[0]}: {old[0].shape[1]} cached tokens, expected {past}"
            keys, values = torch.cat([old[0], key], 1), torch.cat([old[1], value], 1)
            self._caches[at] = keys, values
            keys, values = (x.repeat_interleave(heads // kv_heads, 0) for x in (keys, values))
            distance = torch.arange(past, past + len(part))[:, None] - torch.arange(keys.shape[1])
            seen = (distance >= 0) & (distance < self._windows[given["layer_idx"]])
            scores = (query @ keys.transpose(1, 2) / size**0.5).masked_fill(~seen, -torch.inf)
            outputs.append((scores.softmax(-1) @ values).transpose(0, 1).reshape(len(part), -1))
        return torch.cat(outputs)


def _rotate(x: Value, first: int, given: dict[str, Any]) -> Value:
    """[heads, tokens, head] by complex multiplication."""
    size = x.shape[-1]
    frequencies = given["base"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.arange(first, first + x.shape[1], dtype=torch.float64)[:, None] * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)
    halves = given["rotation"] == PositionEmbeddingType.rope_gpt_neox
    real, imaginary = (x[..., : size // 2], x[..., size // 2 :]) if halves else (x[..., 0::2], x[..., 1::2])
    turned = torch.complex(real.double(), imaginary.double()) * turn
    if halves:
        return torch.cat([turned.real, turned.imag], dim=-1).float()
    return torch.stack([turned.real, turned.imag], dim=-1).flatten(-2).float()


def _experts(inputs: Sequence[Value], top_k: int) -> Value:
    x, logits, fc, proj = inputs
    values, chosen = logits.topk(top_k, dim=-1)
    scores = values.softmax(-1)
    rows = []
    for token in range(len(x)):
        row = torch.zeros_like(x[token])
        for expert, score in zip(chosen[token].tolist(), scores[token], strict=True):
            linear, gate = (fc[expert] @ x[token]).chunk(2)
            row += score * (proj[expert] @ (functional.silu(gate) * linear))
        rows.append(row)
    return torch.stack(rows)
