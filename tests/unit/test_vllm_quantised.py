"""Quantised checkpoints on the way into vLLM: where each tensor goes, what a rank keeps of it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.config import ModelConfig
from pt_trtllm.errors import CheckpointError, ConfigError
from pt_trtllm.mapping import Mapping
from pt_trtllm.vllm.loading import cut, load_weights
from pt_trtllm.vllm.quantised import (
    is_plain,
    kv_scales_problem,
    needed,
    place_of,
    share_of,
    split_problem,
    tied_head_problem,
)
from pt_trtllm.vllm.weights import EMBEDDING, HEAD, OUTPUT_NORM, placements

pytestmark = pytest.mark.unit

CONFIG = ModelConfig(
    vocab_size=32, num_hidden_layers=1, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=128, num_tracks=2, feed_forward_pattern=("dense",),
)  # fmt: skip
LAYER = "model.tracks.1.layers.0."


def test_what_belongs_to_a_quantised_matrix_goes_where_the_matrix_goes() -> None:
    places = placements(CONFIG, Mapping(num_tracks=2))
    scale = place_of(LAYER + "self_attn.k_proj.weight_scale", places)
    assert scale is not None
    assert (scale.module, scale.parameter, scale.shard) == (LAYER + "self_attn.qkv_proj", "weight_scale", "k")
    assert scale.shape is None
    packed = place_of(LAYER + "mlp.down_proj.weight_packed", places)
    assert packed is not None
    assert (packed.module, packed.parameter, packed.shard) == (LAYER + "mlp.down_proj", "weight_packed", None)


def test_tensors_beside_norms_and_routers_have_no_place() -> None:
    sparse = ModelConfig.from_dict({
        **CONFIG.to_dict(), "feed_forward_pattern": ["sparse"], "num_experts": 2, "num_experts_per_tok": 1,
        "moe_intermediate_size": 64,
    })  # fmt: skip
    places = placements(sparse, Mapping(num_tracks=2))
    assert place_of(LAYER + "input_layernorm.weight_scale", places) is None
    assert place_of(LAYER + "mlp.router.weight_scale", places) is None
    expert = place_of(LAYER + "mlp.experts.1.up_proj.weight_scale", places)
    assert expert is not None
    assert (expert.parameter, expert.shard, expert.expert) == ("w13_weight_scale", "w3", 1)


@pytest.mark.parametrize(
    ("part", "size", "stored", "expected"),
    [
        (range(32, 64), 64, 64, range(32, 64)),  # a scale per row
        (range(32, 64), 64, 8, range(4, 8)),  # eight numbers in one
        (range(32, 64), 64, 2, range(1, 2)),  # groups of 32
        (range(32, 64), 64, 1, range(1)),  # one for all
        (range(16, 32), 64, 2, None),  # half a group
    ],
)
def test_a_part_of_a_matrix_is_a_part_of_what_describes_it(
    part: range, size: int, stored: int, expected: range | None
) -> None:
    assert share_of(part, size, stored) == expected


def test_scales_are_cut_with_rows_and_not_with_columns() -> None:
    places = placements(CONFIG, Mapping(world_size=4, num_tracks=2, rank=3))

    def kept(name: str, tensor: torch.Tensor) -> torch.Tensor:
        place = place_of(LAYER + name, places)
        assert place is not None
        return cut(place, name, tensor)

    rows = torch.arange(64).view(64, 1)
    assert torch.equal(kept("self_attn.q_proj.weight_scale", rows), rows[32:])
    assert torch.equal(kept("self_attn.o_proj.weight_scale", rows), rows)
    groups = torch.arange(128).view(64, 2)
    assert torch.equal(kept("self_attn.o_proj.weight_scale", groups), groups[:, 1:])
    assert torch.equal(kept("self_attn.q_proj.weight_scale", groups), groups[32:])
    shape = torch.tensor([64, 64])
    assert torch.equal(kept("self_attn.q_proj.weight_shape", shape), shape)
    assert kept("self_attn.o_proj.input_scale", torch.tensor(0.5)).item() == 0.5


def test_a_group_that_ranks_would_share_is_refused() -> None:
    places = placements(CONFIG, Mapping(world_size=8, num_tracks=2, rank=7))
    name = LAYER + "self_attn.o_proj.weight_scale"
    place = place_of(name, places)
    assert place is not None
    with pytest.raises(CheckpointError, match=r"2 entries for 64 columns.*would share an entry"):
        cut(place, name, torch.zeros(64, 2))


def test_a_module_needs_the_tensors_of_its_own_kind() -> None:
    name = LAYER + "self_attn.o_proj.weight"
    place = placements(CONFIG, Mapping(num_tracks=2))[name]
    made = ["weight_packed", "weight_scale", "weight_shape", "bias"]
    beside = name.removesuffix("weight")
    assert needed(name, place, made) == [beside + "weight_packed", beside + "weight_scale"]
    assert needed(name, place, ["weight"]) == [name]
    assert needed(name, place, []) == [name]


class Model(nn.Module):
    """Parameters of the names and sizes that vLLM makes of CONFIG in int8 on one rank, and loaders that copy."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: dict[str, torch.Tensor] = {}
        self.shapes = {EMBEDDING: (32, 64), HEAD: (32, 64), OUTPUT_NORM: (64,)}
        for place in placements(CONFIG, Mapping(num_tracks=2)).values():
            assert place.shape is not None
            self.shapes[f"{place.module}.{place.parameter}"] = place.shape
            if place.matrix is not None:
                self.shapes[f"{place.module}.weight_scale"] = (place.shape[0], 1)

    def named_parameters(self, *args: object, **kwargs: object):  # type: ignore[no-untyped-def]
        for name, shape in self.shapes.items():
            int8 = f"{name}_scale" in self.shapes
            parameter = nn.Parameter(torch.zeros(shape, dtype=torch.int8 if int8 else None), requires_grad=False)
            parameter.weight_loader = lambda own, tensor, *shard: None  # type: ignore[attr-defined]
            yield name, parameter


def tensors(config: ModelConfig = CONFIG) -> dict[str, torch.Tensor]:
    found = {EMBEDDING: torch.zeros(32, 64), HEAD: torch.zeros(32, 64), OUTPUT_NORM: torch.zeros(64)}
    for name, place in placements(config, Mapping(num_tracks=2)).items():
        assert place.shape is not None
        if place.matrix is None:
            found[name] = torch.zeros(place.shape)
        else:
            found[name] = torch.zeros(place.shape, dtype=torch.int8)
            found[f"{name}_scale"] = torch.zeros(place.shape[0], 1)
    return found


def load(given: dict[str, torch.Tensor]) -> set[str]:
    return load_weights(Model(), CONFIG, Mapping(num_tracks=2), given.items())


def test_a_whole_quantised_checkpoint_fills_every_parameter() -> None:
    assert load(tensors()) == {name for name, _ in Model().named_parameters()}


def test_a_missing_scale_is_named() -> None:
    given = tensors()
    del given[LAYER + "self_attn.v_proj.weight_scale"]
    with pytest.raises(CheckpointError, match=f"{LAYER}self_attn.v_proj.weight_scale is missing"):
        load(given)


@pytest.mark.parametrize(
    ("name", "tensor", "match"),
    [
        ("mlp.up_proj.weight_packed", torch.zeros(1), "up_proj.weight_packed has no place: .*quantization_config"),
        ("mlp.router.weight_scale", torch.zeros(1), "not a tensor of this model .a router is never quantised"),
        ("mlp.up_proj.weight", torch.zeros(3, 3, dtype=torch.int8), r"\[3, 3\], expected \[128, 64\]"),
    ],
)
def test_what_does_not_fit_is_named(name: str, tensor: torch.Tensor, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        load({**tensors(), LAYER + name: tensor})


def test_integers_in_a_module_that_is_not_quantised_are_refused() -> None:
    name = LAYER + "input_layernorm.weight"
    with pytest.raises(CheckpointError, match=r"is torch.int8, but its module is not quantised"):
        load({**tensors(), name: torch.zeros(64, dtype=torch.int8)})


def test_what_cannot_be_served_quantised_is_told_by_name() -> None:
    assert tied_head_problem(["weight"]) is None
    assert "tie_word_embeddings to false" in str(tied_head_problem(["weight_packed", "weight_scale"]))
    assert split_problem("awq", 1) is None
    assert split_problem("compressed-tensors", 2) is None
    assert "split over 2 ranks each in a checkpoint quantised by 'awq'" in str(split_problem("awq", 2))
    assert kv_scales_problem(None) is None
    assert kv_scales_problem(SimpleNamespace(kv_cache_scheme=None)) is None
    assert "--kv-cache-dtype" in str(kv_scales_problem(SimpleNamespace(kv_cache_scheme={"num_bits": 8})))


def test_a_model_is_plain_where_nothing_is_quantised_and_no_adapter_can_come() -> None:
    assert is_plain(SimpleNamespace(quant_config=None, lora_config=None))
    assert not is_plain(SimpleNamespace(quant_config=object(), lora_config=None))
    assert not is_plain(SimpleNamespace(quant_config=None, lora_config=object()))


def test_convert_names_a_quantised_folder(tmp_path: Path) -> None:
    config = {
        **CONFIG.to_dict(), "model_type": "parallel_track",
        "quantization_config": {"quant_method": "compressed-tensors"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"weights are quantised .quant_method 'compressed-tensors'.*in vLLM"):
        convert(tmp_path, tmp_path / "out", ConvertOptions())
