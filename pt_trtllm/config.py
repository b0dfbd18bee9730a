"""What a Parallel Track model is: one frozen, validated description that every part of the project reads.

Field names follow Hugging Face where a name exists. Counts of heads and feed-forward widths are per track.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass
from typing import Any, Literal

from pt_trtllm.errors import ConfigError

AttentionKind = Literal["local_rope", "local_nope", "global_rope", "global_nope"]
FeedForwardKind = Literal["dense", "sparse"]

ATTENTION_KINDS = ("local_rope", "local_nope", "global_rope", "global_nope")
FEED_FORWARD_KINDS = ("dense", "sparse")
NORM_KINDS = ("rms_norm", "pre_scale_rms_norm")
QK_NORM_KINDS = ("none", "scaled", "unscaled")
MAX_POSITIONS = 1 << 24
MAX_SIZE = (1 << 31) - 1
"""Of anything that is counted: sizes and token ids fit in 32 bits."""
MAX_LAYERS = 1 << 16
MAX_PARTS = 1 << 20
"""Layers x tracks x experts: far above any model, and still soon listed."""
SHOWN_LENGTH = 80
SHOWN_ITEMS = 8
DTYPES = ("bfloat16", "float16", "float32")


def problems_to_error(what: str, problems: list[str]) -> None:
    """Raises one ConfigError that lists every problem, or does nothing."""
    if problems:
        raise ConfigError(f"{what}: " + "; ".join(problems))


def reject_unknown_keys(what: str, given: MappingABC[str, Any], known: set[str]) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        raise ConfigError(f"{what}: unknown keys {unknown}; known keys are {sorted(known)}")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained length (Hugging Face's `rope_scaling`)."""

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_position_embeddings: int = 0
    """Trained length; needed by llama3 and yarn."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """yarn: multiplies cos and sin; None means 0.1 ln(factor) + 1."""
    truncate: bool = True
    """yarn: round the correction range to whole dimensions."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)!r}, expected a number"
            for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
            if not is_finite_number(getattr(self, name))
        ]
        trained: Any = self.original_max_position_embeddings
        if not isinstance(trained, int):
            problems.append(f"original_max_position_embeddings is {trained!r}, expected a whole number")
        if self.attention_factor is not None and not is_finite_number(self.attention_factor):
            problems.append(f"attention_factor is {self.attention_factor!r}, expected a number or null")
        problems_to_error("rope_scaling", problems)
        if self.kind not in ("linear", "llama3", "yarn"):
            problems.append(f"kind is {self.kind!r}, expected linear, llama3 or yarn")
        if not self.factor >= 1.0:
            problems.append(f"factor is {self.factor}, expected at least 1")
        if self.kind in ("llama3", "yarn") and self.original_max_position_embeddings < 1:
            problems.append(f"{self.kind} needs original_max_position_embeddings")
        if self.kind == "llama3" and not self.high_freq_factor > self.low_freq_factor:
            problems.append("high_freq_factor must be above low_freq_factor")
        if self.attention_factor is not None and not self.attention_factor > 0:
            problems.append(f"attention_factor is {self.attention_factor}, expected above 0")
        if self.kind == "yarn" and not self.beta_fast > self.beta_slow > 0:
            problems.append(f"beta_fast {self.beta_fast} must be above beta_slow {self.beta_slow}, and both above 0")
        problems_to_error("rope_scaling", problems)

    @classmethod
    def from_dict(cls, data: MappingABC[str, Any]) -> RopeScaling:
        reject_unknown_keys("rope_scaling", data, {f.name for f in dataclasses.fields(cls)})
        try:
            return cls(**data)
        except TypeError as error:
            raise ConfigError(f"rope_scaling: {error}") from None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A PT decoder. `num_tracks` = 1 is an ordinary transformer (Llama, Mistral, Qwen)."""

    vocab_size: int
    num_hidden_layers: int
    """Layers per track."""
    hidden_size: int
    """Width of the residual stream, shared by all tracks."""
    num_attention_heads: int
    """Query heads per track."""
    head_dim: int
    intermediate_size: int | None = None
    """Width of dense feed-forwards per track; None when every layer is sparse."""

    num_tracks: int = 1
    sync_interval: int | None = None
    """D: tracks are fused after every D layers. None means once, after the last layer."""
    num_key_value_heads: int | None = None
    """Key/value heads per track; None means as many as query heads."""
    max_position_embeddings: int = 32768

    attention_pattern: tuple[AttentionKind, ...] = ("global_rope",)
    """Repeated over the layers: local/global attention, with or without rotary positions."""
    attention_window: int = 4096
    """Local layers see this many tokens before the current one (4096 attends to 4097 tokens)."""
    rope_theta: float = 10000.0
    rope_style: Literal["interleaved", "half"] = "half"
    """Which features make a rotated pair: neighbours (reference PT) or the two halves of a head (Llama)."""
    rope_scaling: RopeScaling | None = None
    qk_norm: Literal["none", "scaled", "unscaled"] = "none"
    qk_norm_position: Literal["after_rope", "before_rope"] = "before_rope"

    feed_forward_pattern: tuple[FeedForwardKind, ...] = ("dense",)
    """Repeated over the layers: dense SwiGLU or sparse mixture of SwiGLU experts."""
    moe_intermediate_size: int | None = None
    num_experts: int = 0
    """Experts per track."""
    num_experts_per_tok: int = 0
    router_logits_cap: float | None = None
    """Router logits are capped to cap * tanh(logits / cap)."""

    pre_norm: str | None = "rms_norm"
    post_norm: str | None = None
    """After the residual add."""
    pre_residual_norm: str | None = None
    """On a sub-layer's output, before the residual add."""
    dispatch_norm: str | None = None
    """Per track, at the start of each segment."""
    combine_norm: str | None = None
    """Per track, at the end of each segment, before the fusion."""
    combine_op: Literal["mean", "sum"] = "mean"
    rms_norm_eps: float = 1e-5

    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Biases on the query, key and value projections."""
    attention_out_bias: bool = False
    mlp_bias: bool = False

    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.sync_interval is None:
            object.__setattr__(self, "sync_interval", self.num_hidden_layers)
        problems_to_error("model config", self._problems())

    def _problems(self) -> list[str]:
        sizes = ("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim", "num_tracks",
                 "sync_interval", "num_key_value_heads", "max_position_embeddings")  # fmt: skip
        problems = [_size_problem(name, getattr(self, name)) for name in sizes]
        problems = [problem for problem in problems if problem]
        if problems:
            return problems  # what follows divides by these
        problems = [
            f"{name} is {shown(getattr(self, name))}, expected a whole number"
            for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "intermediate_size")
            if getattr(self, name) not in (None, 0) and not is_positive_int(getattr(self, name))
        ]
        if problems:
            return problems
        experts = self.num_experts or 1
        if self.num_hidden_layers * self.num_tracks * experts > MAX_PARTS:
            return [f"num_hidden_layers {self.num_hidden_layers} x num_tracks {self.num_tracks} x num_experts "
                    f"{experts} is above {MAX_PARTS}, which no model is"]  # fmt: skip
        if self.num_hidden_layers % self.interval:
            problems.append(f"sync_interval {self.interval} does not divide num_hidden_layers {self.num_hidden_layers}")
        if self.num_attention_heads % self.num_kv_heads:
            problems.append(
                f"num_key_value_heads {self.num_kv_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        problems += self._attention_problems() + self._feed_forward_problems()
        for name in ("pre_norm", "post_norm", "pre_residual_norm", "dispatch_norm", "combine_norm"):
            if getattr(self, name) not in (None, *NORM_KINDS):
                problems.append(f"{name} is {getattr(self, name)!r}, expected null or one of {list(NORM_KINDS)}")
        if self.combine_op not in ("mean", "sum"):
            problems.append(f"combine_op is {self.combine_op!r}, expected mean or sum")
        if not (is_finite_number(self.rms_norm_eps) and self.rms_norm_eps > 0):
            problems.append(f"rms_norm_eps is {self.rms_norm_eps!r}, expected a positive number")
        for name in ("tie_word_embeddings", "attention_bias", "attention_out_bias", "mlp_bias"):
            if not isinstance(getattr(self, name), bool):
                problems.append(f"{name} is {getattr(self, name)!r}, expected true or false")
        scaling: Any = self.rope_scaling
        if scaling is not None and not isinstance(scaling, RopeScaling):
            problems.append(f"rope_scaling is {scaling!r}, expected null or an object with a kind")
        for name in ("bos_token_id", "pad_token_id"):
            token = getattr(self, name)
            if token is not None and not (isinstance(token, int) and 0 <= token < self.vocab_size):
                problems.append(f"{name} is {shown(token)}, expected null or an id below vocab_size {self.vocab_size}")
        return problems

    def _attention_problems(self) -> list[str]:
        problems = _pattern_problems("attention_pattern", self.attention_pattern, ATTENTION_KINDS)
        if self.head_dim % 2:
            problems.append(f"head_dim is {self.head_dim}, expected an even number")
        if not (isinstance(self.attention_window, int) and 0 <= self.attention_window <= MAX_SIZE):
            problems.append(f"attention_window is {shown(self.attention_window)}, expected a whole number, 0 or more")
        if not (is_finite_number(self.rope_theta) and self.rope_theta > 0):
            problems.append(f"rope_theta is {shown(self.rope_theta)}, expected a positive number")
        if self.rope_style not in ("interleaved", "half"):
            problems.append(f"rope_style is {self.rope_style!r}, expected interleaved or half")
        if self.qk_norm not in QK_NORM_KINDS:
            problems.append(f"qk_norm is {self.qk_norm!r}, expected one of {list(QK_NORM_KINDS)}")
        if self.qk_norm_position not in ("after_rope", "before_rope"):
            problems.append(f"qk_norm_position is {self.qk_norm_position!r}, expected after_rope or before_rope")
        return problems

    def _feed_forward_problems(self) -> list[str]:
        problems = _pattern_problems("feed_forward_pattern", self.feed_forward_pattern, FEED_FORWARD_KINDS)
        if problems:
            return problems
        if self.router_logits_cap is not None and not (
            is_finite_number(self.router_logits_cap) and self.router_logits_cap > 0
        ):
            problems.append(f"router_logits_cap is {shown(self.router_logits_cap)}, expected null or a positive number")
        kinds = {self.feed_forward_kind(i) for i in range(self.num_hidden_layers)}
        if "dense" in kinds and not is_positive_int(self.intermediate_size):
            problems.append(f"intermediate_size is {shown(self.intermediate_size)}, needed by dense feed-forwards")
        if "sparse" in kinds:
            for name in ("moe_intermediate_size", "num_experts", "num_experts_per_tok"):
                if not is_positive_int(getattr(self, name)):
                    problems.append(f"{name} is {getattr(self, name)!r}, needed by sparse feed-forwards")
            if not problems and self.num_experts_per_tok > self.num_experts:
                problems.append(
                    f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_experts {self.num_experts}"
                )
        return problems

    # Derived values -------------------------------------------------------------------------------------------

    @property
    def interval(self) -> int:
        """D, the number of layers between two fusions."""
        assert self.sync_interval is not None
        return self.sync_interval

    @property
    def num_kv_heads(self) -> int:
        assert self.num_key_value_heads is not None
        return self.num_key_value_heads

    def attention_kind(self, layer_idx: int) -> AttentionKind:
        return self.attention_pattern[layer_idx % len(self.attention_pattern)]

    def feed_forward_kind(self, layer_idx: int) -> FeedForwardKind:
        return self.feed_forward_pattern[layer_idx % len(self.feed_forward_pattern)]

    def window(self, layer_idx: int) -> int | None:
        """Tokens before the current one that a layer sees; None means all of them."""
        return self.attention_window if self.attention_kind(layer_idx).startswith("local") else None

    def uses_rope(self, layer_idx: int) -> bool:
        return self.attention_kind(layer_idx).endswith("rope")

    # Both ways to plain data ----------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}

    @classmethod
    def from_dict(cls, data: MappingABC[str, Any]) -> ModelConfig:
        """The strict inverse of `to_dict`: an unknown key is an error."""
        reject_unknown_keys("model config", data, {f.name for f in dataclasses.fields(cls)})
        required = [
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        missing = [name for name in required if name not in data]
        if missing:
            raise ConfigError(f"model config: missing keys {missing}")
        values = dict(data)
        for name in ("attention_pattern", "feed_forward_pattern"):
            if name in values:
                if not isinstance(values[name], (list, tuple)):
                    raise ConfigError(f"model config: {name} is {shown(values[name])}, expected a list")
                values[name] = tuple(values[name])
        if "eos_token_id" in values:
            values["eos_token_id"] = as_token_ids(values["eos_token_id"])
        if isinstance(values.get("rope_scaling"), MappingABC):
            values["rope_scaling"] = RopeScaling.from_dict(values["rope_scaling"])
        return cls(**values)


def as_token_ids(value: Any) -> tuple[int, ...]:
    """Hugging Face writes one id, a list of ids or null for the end of sequence."""
    ids = () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token <= MAX_SIZE for token in ids):
        raise ConfigError(f"model config: eos_token_id is {shown(value)}, expected an id, a list of ids or null")
    return ids


def _pattern_problems(name: str, pattern: tuple[str, ...], kinds: tuple[str, ...]) -> list[str]:
    bad = [kind for kind in pattern if kind not in kinds]
    if pattern and not bad:
        return []
    return [f"{name} is {list(pattern)!r}, expected a non-empty list of {list(kinds)}"]


def _size_problem(name: str, value: Any) -> str:
    most = MAX_POSITIONS if name == "max_position_embeddings" else MAX_SIZE
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        return f"{name} is {shown(value)}, expected a positive whole number"
    return f"{name} is {shown(value)}, expected at most {most}" if value > most else ""


def is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_SIZE


def is_finite_number(value: Any) -> bool:
    """Also as a float: a whole number beyond its range is not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def shown(value: Any, levels: int = 4) -> str:
    """For a message: short, on one line, and without the digits of numbers that Python refuses to spell. Of what is
    nested, the upper levels."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, (list, tuple, dict)) and not levels:
        return "..."
    if isinstance(value, (list, tuple)):
        inner = ", ".join(shown(entry, levels - 1) for entry in value[:SHOWN_ITEMS])
        return _cut(f"[{inner}{', ...' if len(value) > SHOWN_ITEMS else ''}]")
    if isinstance(value, dict):
        some = ", ".join(
            f"{shown(key)}: {shown(entry, levels - 1)}" for key, entry in itertools.islice(value.items(), SHOWN_ITEMS)
        )
        return _cut("{" + some + (", ..." if len(value) > SHOWN_ITEMS else "") + "}")
    if isinstance(value, str):
        return _cut(repr(value[:SHOWN_LENGTH]))
    return _cut(" ".join(str(value).split()))


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_LENGTH else text[:SHOWN_LENGTH] + "..."
