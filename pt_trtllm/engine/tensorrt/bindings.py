"""The tensors an engine is bound to: names, types, and shapes within each optimisation profile.

    input_ids            int32 [batch, tokens]
    position_ids         int32 [batch, tokens]
    cache_write_indices  int32 [batch]             where each row's new keys and values go in its cache
    key_value_lengths    int32 [batch]             tokens in each row's cache after this step
    logit_rows           int32 [rows]              tokens (of batch * tokens) whose logits are wanted
    past_key_{layer}     [batch, tracks * kv_heads, capacity, head_dim]; updated in place as present_key_{layer}
    past_value_{layer}   likewise
    logits               float32 [rows, vocabulary], on every rank

The context profile computes one sequence's chunk, any number of tokens; the generation profile one token each of a
batch. TensorRT is not needed to read this table.
"""

from __future__ import annotations

from dataclasses import dataclass

from pt_trtllm.config import ModelConfig
from pt_trtllm.engine.bundle import BuildLimits
from pt_trtllm.mapping import Mapping

CONTEXT, GENERATION = 0, 1
PROFILES = ("context", "generation")
CACHE_ALIGNMENT = 64
"""Capacity is a multiple of it, so that attention kernels read whole tiles."""

Range = tuple[int, int, int]
"""Smallest, typical and largest size of an axis."""


@dataclass(frozen=True, kw_only=True)
class Binding:
    name: str
    dtype: str
    is_input: bool
    profiles: tuple[tuple[Range, ...], tuple[Range, ...]]
    """Per profile, the range of every axis."""
    aliases: str | None = None
    """The input whose memory this output is."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As in the network: -1 where the size varies within or between profiles."""
        return tuple(
            context[0] if context == generation and context[0] == context[2] else -1
            for context, generation in zip(*self.profiles, strict=True)
        )

    def shapes(self, profile: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Smallest, typical and largest shape within a profile."""
        axes = self.profiles[profile]
        smallest, typical, largest = (tuple(axis[i] for axis in axes) for i in range(3))
        return smallest, typical, largest


def cache_capacity(limits: BuildLimits) -> int:
    """Positions of a row's cache: the longest sequence, and at least one more that idle rows may write to."""
    return -(-(limits.max_seq_len + 1) // CACHE_ALIGNMENT) * CACHE_ALIGNMENT


def bindings(
    model: ModelConfig, mapping: Mapping, limits: BuildLimits, dtype: str, *, context_logits: bool
) -> list[Binding]:
    """`context_logits`: a chunk may ask for the logits of all its tokens, not of one."""
    batch, tokens, rows = _axes(limits, context_logits)
    one, vocabulary = _fixed(1), _fixed(model.vocab_size)
    table = [
        Binding(name="input_ids", dtype="int32", is_input=True, profiles=((one, tokens), (batch, one))),
        Binding(name="position_ids", dtype="int32", is_input=True, profiles=((one, tokens), (batch, one))),
        Binding(name="cache_write_indices", dtype="int32", is_input=True, profiles=((one,), (batch,))),
        Binding(name="key_value_lengths", dtype="int32", is_input=True, profiles=((one,), (batch,))),
        Binding(name="logit_rows", dtype="int32", is_input=True, profiles=((rows,), (batch,))),
    ]
    heads = _fixed(mapping.tracks_per_rank * mapping.kv_heads_per_rank(model.num_kv_heads))
    rest = (heads, _fixed(cache_capacity(limits)), _fixed(model.head_dim))
    cache = ((one, *rest), (batch, *rest))
    for layer_idx in range(model.num_hidden_layers):
        for kind in ("key", "value"):
            past, present = f"past_{kind}_{layer_idx}", f"present_{kind}_{layer_idx}"
            table.append(Binding(name=past, dtype=dtype, is_input=True, profiles=cache))
            table.append(Binding(name=present, dtype=dtype, is_input=False, profiles=cache, aliases=past))
    logits = ((rows, vocabulary), (batch, vocabulary))
    table.append(Binding(name="logits", dtype="float32", is_input=False, profiles=logits))
    return table


def _axes(limits: BuildLimits, context_logits: bool) -> tuple[Range, Range, Range]:
    """Rows of the generation profile; tokens of a chunk; rows of logits of a chunk."""
    longest = max(1, min(limits.max_num_tokens, limits.max_seq_len))
    batch = (1, limits.max_batch_size, limits.max_batch_size)
    tokens = (1, min(longest, max(1, limits.max_input_len)), longest)
    return batch, tokens, (1, 1, longest) if context_logits else _fixed(1)


def _fixed(size: int) -> Range:
    return (size, size, size)
