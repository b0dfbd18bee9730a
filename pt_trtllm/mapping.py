"""Every question about ranks: which tracks a rank holds, with whom it communicates, and how often.

Example, 4 tracks (T0..T3):

    R = 2 (2 tracks per rank)      R = 4 (1 per rank)        R = 8 (each track split over 2 ranks)
    rank 0: T0 T1                  rank 0: T0                rank 0: T0/0   rank 1: T0/1   <- one TP group
    rank 1: T2 T3                  rank 1: T1                rank 2: T1/0   rank 3: T1/1
    fusion group {0, 1}            rank 2: T2                rank 4: T2/0   rank 5: T2/1
                                   rank 3: T3                rank 6: T3/0   rank 7: T3/1
                                   fusion group {0..3}       fusion groups {0,2,4,6} and {1,3,5,7}

With one track (n = 1) this is ordinary tensor parallelism over R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from pt_trtllm.config import MAX_PARTS, ModelConfig, shown
from pt_trtllm.errors import ConfigError

SyncKind = Literal["track_fusion", "tensor_parallel", "logits"]
MAX_RANKS = 1 << 16
SYNC_KINDS: tuple[SyncKind, ...] = ("track_fusion", "tensor_parallel", "logits")


@dataclass(frozen=True, kw_only=True)
class Mapping:
    """The place of one rank in a world of `world_size` ranks that share `num_tracks` tracks."""

    world_size: int = 1
    num_tracks: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if self.world_size < 1 or self.num_tracks < 1:
            raise ConfigError(f"mapping: {self.num_tracks} tracks on {self.world_size} ranks; both must be at least 1")
        if self.world_size > MAX_RANKS or self.num_tracks > MAX_PARTS:
            raise ConfigError(
                f"mapping: {shown(self.num_tracks)} tracks on {shown(self.world_size)} ranks; expected at most "
                f"{MAX_PARTS} tracks and {MAX_RANKS} ranks"
            )
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"mapping: rank {self.rank} is outside the world of {self.world_size} ranks")
        if self.num_tracks % self.world_size and self.world_size % self.num_tracks:
            raise ConfigError(
                f"mapping: {self.num_tracks} tracks cannot be spread over {self.world_size} ranks; "
                f"the number of ranks must divide the tracks or be a multiple of them "
                f"(possible here: {', '.join(map(str, self.possible_world_sizes(self.num_tracks)))}, ...)"
            )

    @staticmethod
    def possible_world_sizes(num_tracks: int) -> list[int]:
        divisors = [size for size in range(1, num_tracks + 1) if num_tracks % size == 0]
        return [*divisors, 2 * num_tracks]

    def for_rank(self, rank: int) -> Mapping:
        return replace(self, rank=rank)

    @property
    def tracks_per_rank(self) -> int:
        """Tracks that a rank computes as one batch (1 when a track is split over ranks)."""
        return max(1, self.num_tracks // self.world_size)

    @property
    def tp_size(self) -> int:
        """Ranks that share one track."""
        return max(1, self.world_size // self.num_tracks)

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def local_tracks(self) -> range:
        first = self.rank // self.tp_size * self.tracks_per_rank
        return range(first, first + self.tracks_per_rank)

    @property
    def tp_group(self) -> tuple[int, ...]:
        """Global ranks that share this rank's track, in order."""
        first = self.rank - self.tp_rank
        return tuple(range(first, first + self.tp_size))

    @property
    def fusion_group(self) -> tuple[int, ...]:
        """Global ranks over which this rank fuses tracks, in order: one of every TP group."""
        return tuple(range(self.tp_rank, self.world_size, self.tp_size))

    def owners(self, track_idx: int) -> tuple[int, ...]:
        """Global ranks that hold (a part of) a track."""
        first = track_idx // self.tracks_per_rank * self.tp_size
        return tuple(range(first, first + self.tp_size))

    def kv_heads_per_rank(self, num_kv_heads: int) -> int:
        """Key/value heads of one track on one rank: split, or repeated when there are fewer heads than ranks."""
        return max(1, num_kv_heads // self.tp_size)

    def check_model(self, config: ModelConfig) -> None:
        """Raises when a track of this model cannot be split over `tp_size` ranks."""
        if config.num_tracks != self.num_tracks:
            raise ConfigError(f"mapping has {self.num_tracks} tracks, the model has {config.num_tracks}")
        tp, problems = self.tp_size, []
        if config.num_attention_heads % tp:
            problems.append(f"{config.num_attention_heads} attention heads")
        if config.num_kv_heads % tp and tp % config.num_kv_heads:
            problems.append(f"{config.num_kv_heads} key/value heads")
        kinds = {config.feed_forward_kind(i) for i in range(config.num_hidden_layers)}
        if "dense" in kinds and (config.intermediate_size or 0) % tp:
            problems.append(f"intermediate_size {config.intermediate_size}")
        if "sparse" in kinds and (config.moe_intermediate_size or 0) % tp:
            problems.append(f"moe_intermediate_size {config.moe_intermediate_size}")
        if problems:
            raise ConfigError(
                f"mapping: {self.world_size} ranks split each of {self.num_tracks} tracks {tp} ways, "
                f"but this model has {', '.join(problems)}; choose a world size that divides them"
            )

    def vocab_shard(self, vocab_size: int) -> range:
        """Rows of the (padded) output projection that this rank computes."""
        rows = self.padded_vocab_size(vocab_size) // self.world_size
        return range(self.rank * rows, (self.rank + 1) * rows)

    def padded_vocab_size(self, vocab_size: int) -> int:
        return -(-vocab_size // self.world_size) * self.world_size


@dataclass(frozen=True, kw_only=True)
class SyncPoint:
    """One collective of a forward pass."""

    kind: SyncKind
    layer_idx: int | None
    """The layer after (or in) which it happens; None for the logits."""
    place: Literal["attention", "feed_forward", "segment_end", "output"]
    group_size: int


def sync_plan(config: ModelConfig, mapping: Mapping) -> tuple[SyncPoint, ...]:
    """The ordered collectives of one forward pass, as every rank of `mapping` executes them.

    Ranks that hold whole tracks meet once per segment: L/D times. A track split over ranks adds two all-reduces
    per layer (2L), as tensor parallelism always does. The vocabulary is sharded, so logits are gathered once.
    A world of one rank never synchronises.
    """
    plan: list[SyncPoint] = []
    fusion_size = len(mapping.fusion_group)
    for layer_idx in range(config.num_hidden_layers):
        if mapping.tp_size > 1:
            for place in ("attention", "feed_forward"):
                plan.append(
                    SyncPoint(kind="tensor_parallel", layer_idx=layer_idx, place=place, group_size=mapping.tp_size)
                )
        if (layer_idx + 1) % config.interval == 0 and fusion_size > 1:
            plan.append(
                SyncPoint(kind="track_fusion", layer_idx=layer_idx, place="segment_end", group_size=fusion_size)
            )
    if mapping.world_size > 1:
        plan.append(SyncPoint(kind="logits", layer_idx=None, place="output", group_size=mapping.world_size))
    return tuple(plan)


def sync_counts(plan: tuple[SyncPoint, ...]) -> dict[str, int]:
    return {kind: sum(point.kind == kind for point in plan) for kind in SYNC_KINDS}
