"""The tensors of a PT model: declared once, with TensorRT-LLM's names, and how each is divided over ranks.

Every tensor is seen as a matrix of rows ([out, in]; vectors are one column), because converting works on blocks of
rows: whatever a checkpoint's size, only a block is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pt_trtllm.config import ModelConfig
from pt_trtllm.mapping import Mapping

LAYER = "transformer.layers.{layer}."
EMBEDDING = "transformer.vocab_embedding.weight"
OUTPUT_NORM = "transformer.ln_f.weight"
OUTPUT_PROJECTION = "lm_head.weight"


@dataclass(frozen=True)
class Section:
    """A run of rows that is dealt to the ranks of a TP group in whole units (heads, or single rows)."""

    rows: int
    units: int

    def share(self, tp_size: int, tp_rank: int) -> tuple[int, int]:
        """First row and number of rows of one rank; with fewer units than ranks, neighbours share a unit."""
        unit = self.rows // self.units
        return tp_rank * self.units // tp_size * unit, max(1, self.units // tp_size) * unit


@dataclass(frozen=True)
class RowSplit:
    """Column-parallel in Megatron's words: output features are divided, section by section."""

    sections: tuple[Section, ...]


@dataclass(frozen=True)
class ColumnSplit:
    """Row-parallel in Megatron's words: input features are divided; partial results are all-reduced."""


@dataclass(frozen=True)
class VocabSplit:
    """Rows are divided over the whole world, padded to a multiple of its size."""


Split = RowSplit | ColumnSplit | VocabSplit | None


@dataclass(frozen=True)
class TensorSpec:
    """One logical tensor of the model. `shape` is that of a single track, before any tensor parallelism."""

    name: str
    shape: tuple[int, ...]
    per_track: bool = True
    split: Split = None
    quantizable: bool = False

    @property
    def rows(self) -> int:
        rows = 1
        for size in self.shape if len(self.shape) == 1 else self.shape[:-1]:
            rows *= size
        return rows

    @property
    def columns(self) -> int:
        return 1 if len(self.shape) == 1 else self.shape[-1]


@dataclass(frozen=True)
class RowRun:
    """Rows of a source block that land together in a rank's tensor."""

    source_row: int
    target_row: int
    rows: int


def rank_rows(spec: TensorSpec, mapping: Mapping) -> int:
    """Rows of one track's tensor that a rank holds."""
    if isinstance(spec.split, RowSplit):
        return sum(section.share(mapping.tp_size, mapping.tp_rank)[1] for section in spec.split.sections)
    if isinstance(spec.split, VocabSplit):
        return len(mapping.vocab_shard(spec.rows))
    return spec.rows


def row_runs(spec: TensorSpec, mapping: Mapping, first_row: int, num_rows: int) -> Iterator[RowRun]:
    """Which rows of a block [first_row, first_row + num_rows) a rank keeps, and where they go."""
    end = first_row + num_rows
    section_start = target = 0
    for source, length, section_rows in _kept(spec, mapping):
        start, stop = section_start + source, section_start + source + length
        low, high = max(start, first_row), min(stop, end)
        if low < high:
            yield RowRun(low - first_row, target + low - start, high - low)
        section_start += section_rows
        target += length


def _kept(spec: TensorSpec, mapping: Mapping) -> Iterator[tuple[int, int, int]]:
    """(first kept row within the section, kept rows, rows of the section)"""
    if isinstance(spec.split, RowSplit):
        for section in spec.split.sections:
            yield *section.share(mapping.tp_size, mapping.tp_rank), section.rows
    elif isinstance(spec.split, VocabSplit):
        shard = mapping.vocab_shard(spec.rows)
        yield shard.start, max(0, min(shard.stop, spec.rows) - shard.start), spec.rows
    else:
        yield 0, spec.rows, spec.rows


def model_tensors(config: ModelConfig, *, separate_head: bool) -> list[TensorSpec]:
    """Every tensor a rank checkpoint must hold. The head is left out where it is the embedding itself."""
    specs = [TensorSpec(EMBEDDING, (config.vocab_size, config.hidden_size), per_track=False)]
    for layer_idx in range(config.num_hidden_layers):
        specs += layer_tensors(config, layer_idx)
    specs.append(TensorSpec(OUTPUT_NORM, (config.hidden_size,), per_track=False))
    if separate_head:
        head_shape = (config.vocab_size, config.hidden_size)
        specs.append(TensorSpec(OUTPUT_PROJECTION, head_shape, per_track=False, split=VocabSplit()))
    return specs


def layer_tensors(config: ModelConfig, layer_idx: int) -> list[TensorSpec]:
    prefix, hidden = LAYER.format(layer=layer_idx), (config.hidden_size,)
    specs: list[TensorSpec] = []

    def add(name: str, shape: tuple[int, ...], split: Split = None, quantizable: bool = False) -> None:
        specs.append(TensorSpec(prefix + name, shape, split=split, quantizable=quantizable))

    if config.dispatch_norm and layer_idx % config.interval == 0:
        add("dispatch_layernorm.weight", hidden)
    if config.pre_norm:
        add("input_layernorm.weight", hidden)
    _add_attention(config, add)
    for norm, name in ((config.pre_residual_norm, "pre_residual"), (config.post_norm, "post_residual")):
        if norm:
            add(f"attention_{name}_layernorm.weight", hidden)
    if config.pre_norm:
        add("post_layernorm.weight", hidden)
    if config.feed_forward_kind(layer_idx) == "dense":
        _add_dense(config, add)
    else:
        _add_sparse(config, add)
    for norm, name in ((config.pre_residual_norm, "pre_residual"), (config.post_norm, "post_residual")):
        if norm:
            add(f"mlp_{name}_layernorm.weight", hidden)
    if config.combine_norm and (layer_idx + 1) % config.interval == 0:
        add("combine_layernorm.weight", hidden)
    return specs


def _add_attention(config: ModelConfig, add) -> None:  # type: ignore[no-untyped-def]
    heads, kv_heads, dim = config.num_attention_heads, config.num_kv_heads, config.head_dim
    sections = (Section(heads * dim, heads), Section(kv_heads * dim, kv_heads), Section(kv_heads * dim, kv_heads))
    qkv_rows = (heads + 2 * kv_heads) * dim
    add("attention.qkv.weight", (qkv_rows, config.hidden_size), RowSplit(sections), quantizable=True)
    if config.attention_bias:
        add("attention.qkv.bias", (qkv_rows,), RowSplit(sections))
    if config.qk_norm == "scaled":
        add("attention.q_layernorm.weight", (dim,))
        add("attention.k_layernorm.weight", (dim,))
    add("attention.dense.weight", (config.hidden_size, heads * dim), ColumnSplit(), quantizable=True)
    if config.attention_out_bias:
        add("attention.dense.bias", (config.hidden_size,))


def _add_dense(config: ModelConfig, add) -> None:  # type: ignore[no-untyped-def]
    width = config.intermediate_size or 0
    rows = RowSplit((Section(width, width),))
    for name in ("mlp.fc", "mlp.gate"):  # TensorRT-LLM applies SiLU to `fc` and multiplies by `gate`
        add(f"{name}.weight", (width, config.hidden_size), rows, quantizable=True)
        if config.mlp_bias:
            add(f"{name}.bias", (width,), rows)
    add("mlp.proj.weight", (config.hidden_size, width), ColumnSplit(), quantizable=True)
    if config.mlp_bias:
        add("mlp.proj.bias", (config.hidden_size,))


def _add_sparse(config: ModelConfig, add) -> None:  # type: ignore[no-untyped-def]
    experts, width = config.num_experts, config.moe_intermediate_size or 0
    add("mlp.router.weight", (experts, config.hidden_size))
    # Per expert: the up projection, then the one that goes through SiLU (TensorRT-LLM's order).
    sections = (Section(width, width), Section(width, width)) * experts
    add("mlp.fc.weight", (experts, 2 * width, config.hidden_size), RowSplit(sections), quantizable=True)
    add("mlp.proj.weight", (experts, config.hidden_size, width), ColumnSplit(), quantizable=True)
