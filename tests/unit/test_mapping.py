"""Ranks and tracks: who holds what, who meets whom, how often."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pt_trtllm.config import ModelConfig
from pt_trtllm.errors import ConfigError
from pt_trtllm.mapping import Mapping, sync_counts, sync_plan

pytestmark = pytest.mark.unit

WORLDS = st.tuples(st.integers(1, 12), st.integers(1, 12)).filter(lambda w: w[0] % w[1] == 0 or w[1] % w[0] == 0)


def model(num_tracks: int, layers: int = 8, interval: int = 4, **options: object) -> ModelConfig:
    return ModelConfig(
        vocab_size=100, num_hidden_layers=layers, hidden_size=48, num_attention_heads=12, head_dim=4,
        intermediate_size=96, num_tracks=num_tracks, sync_interval=interval, **options,
    )  # fmt: skip


@given(WORLDS)
def test_every_track_has_the_owners_that_hold_it(world: tuple[int, int]) -> None:
    world_size, num_tracks = world
    ranks = [Mapping(world_size=world_size, num_tracks=num_tracks, rank=rank) for rank in range(world_size)]
    for track in range(num_tracks):
        holders = tuple(m.rank for m in ranks if track in m.local_tracks)
        assert holders == ranks[0].owners(track)
        assert len(holders) == ranks[0].tp_size
    assert sum(len(m.local_tracks) for m in ranks) == num_tracks * ranks[0].tp_size


@given(WORLDS)
def test_groups_partition_the_world_and_cross_in_one_rank(world: tuple[int, int]) -> None:
    world_size, num_tracks = world
    ranks = [Mapping(world_size=world_size, num_tracks=num_tracks, rank=rank) for rank in range(world_size)]
    for groups in ([m.tp_group for m in ranks], [m.fusion_group for m in ranks]):
        assert sorted(rank for group in set(groups) for rank in group) == list(range(world_size))
    for m in ranks:
        assert set(m.tp_group) & set(m.fusion_group) == {m.rank}
        assert m.tp_group[m.tp_rank] == m.rank
        # A fusion group sees every track exactly once.
        assert sorted(t for r in m.fusion_group for t in ranks[r].local_tracks) == list(range(num_tracks))


@given(WORLDS, st.integers(1, 500))
def test_vocabulary_shards_cover_the_padded_vocabulary(world: tuple[int, int], vocab_size: int) -> None:
    world_size, num_tracks = world
    shards = [
        Mapping(world_size=world_size, num_tracks=num_tracks, rank=r).vocab_shard(vocab_size) for r in range(world_size)
    ]
    assert [row for shard in shards for row in shard] == list(range(shards[-1].stop))
    assert vocab_size <= shards[-1].stop < vocab_size + world_size


@given(WORLDS)
def test_the_plan_has_l_over_d_fusions_and_two_reductions_per_split_layer(world: tuple[int, int]) -> None:
    world_size, num_tracks = world
    counts = sync_counts(sync_plan(model(num_tracks), Mapping(world_size=world_size, num_tracks=num_tracks)))
    assert counts["track_fusion"] == (8 // 4 if min(world) > 1 else 0)
    assert counts["tensor_parallel"] == (2 * 8 if world_size > num_tracks else 0)
    assert counts["logits"] == (1 if world_size > 1 else 0)


def test_the_plan_is_in_the_order_of_execution() -> None:
    plan = sync_plan(model(2, layers=2, interval=1), Mapping(world_size=4, num_tracks=2))
    places = [(point.layer_idx, point.place, point.group_size) for point in plan]
    layers = [[(i, "attention", 2), (i, "feed_forward", 2), (i, "segment_end", 2)] for i in range(2)]
    assert places == [*layers[0], *layers[1], (None, "output", 4)]


@pytest.mark.parametrize(("num_tracks", "world_size"), [(5, 2), (4, 3), (4, 6), (3, 2)])
def test_impossible_mappings_are_refused_with_possible_ones(num_tracks: int, world_size: int) -> None:
    with pytest.raises(
        ConfigError, match=f"{num_tracks} tracks cannot be spread over {world_size} ranks.*possible here: 1"
    ):
        Mapping(world_size=world_size, num_tracks=num_tracks)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"num_key_value_heads": 3}, "3 key/value heads"), ({"intermediate_size": 97}, "intermediate_size 97")],
)
def test_models_that_cannot_be_split_are_refused(options: dict[str, int], named: str) -> None:
    config = ModelConfig.from_dict({**model(1).to_dict(), **options})
    with pytest.raises(ConfigError, match=named):
        Mapping(world_size=2, num_tracks=1).check_model(config)


def test_few_key_value_heads_are_shared_by_neighbouring_ranks() -> None:
    mapping = Mapping(world_size=4, num_tracks=1)
    mapping.check_model(model(1, num_key_value_heads=2))
    assert mapping.kv_heads_per_rank(2) == 1
