"""What the lowering puts into a network: its tensors, its weights, and where collectives stand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.checkpoint.quantize import Quantization
from pt_trtllm.checkpoint.rank_files import rank_specs
from pt_trtllm.engine.tensorrt.network import RankNetwork
from pt_trtllm.errors import EngineError
from pt_trtllm.mapping import Mapping, sync_plan
from pt_trtllm.testing.cases import DENSE
from pt_trtllm.testing.tensorrt import RecordedCollective, engine_config, recording, world_networks

pytest.importorskip("tensorrt_rtx", reason="needs pip install '.[rtx]'")

pytestmark = pytest.mark.unit

MakeSource = Callable[..., Path]


def checkpoint(make_source: MakeSource, tmp_path: Path, options: ConvertOptions, **model: object) -> Path:
    convert(make_source(**model), tmp_path / "checkpoint", options)
    return tmp_path / "checkpoint"


def layer_names(network: RankNetwork) -> list[str]:
    return [network.network.get_layer(index).name for index in range(network.network.num_layers)]


def places(network: RankNetwork) -> list[tuple[str, int | None]]:
    """Every collective, in order, with the layer of the decoder whose cache was updated last before it."""
    found: list[tuple[str, int | None]] = []
    layer_idx = -1
    for name in layer_names(network):
        if name.startswith("key_cache_"):
            layer_idx = int(name.rsplit("_", 1)[1])
        elif name.startswith("collective_"):
            _, number, kind = name.split("_", 2)
            assert int(number) == len(found)
            found.append((kind, None if kind == "logits" else layer_idx))
    return found


@pytest.mark.parametrize(
    ("world_size", "num_tracks", "interval", "op"),
    [(1, 4, 2, "mean"), (2, 4, 1, "mean"), (4, 4, 2, "sum"), (4, 2, 2, "mean"), (4, 1, 4, "mean"), (2, 1, 2, "mean")],
)
def test_collectives_stand_where_the_sync_plan_says(
    make_source: MakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int, num_tracks: int,
    interval: int, op: str,
) -> None:  # fmt: skip
    import tensorrt_rtx

    calls: list[RecordedCollective] = []
    add = recording(calls, tensorrt_rtx.INetworkDefinition.add_dist_collective)
    monkeypatch.setattr(tensorrt_rtx.INetworkDefinition, "add_dist_collective", add)
    folder = checkpoint(
        make_source, tmp_path, ConvertOptions(world_size=world_size), num_tracks=num_tracks,
        num_layers_per_track_per_sync_point=interval, tracks_combine_op=op,
    )  # fmt: skip
    config = engine_config(folder)
    plan = sync_plan(config.checkpoint.model, config.mapping)
    networks = world_networks(folder)
    assert len(calls) == len(plan) * world_size
    for rank, network in enumerate(networks):
        assert places(network) == [(point.kind, point.layer_idx) for point in plan]
        mapping, mine = config.mapping.for_rank(rank), calls[rank * len(plan) : (rank + 1) * len(plan)]
        assert mine == [expected_call(point.kind, mapping, op) for point in plan]


def expected_call(kind: str, mapping: Mapping, op: str) -> RecordedCollective:
    if kind == "tensor_parallel":
        return RecordedCollective("ALL_REDUCE", "SUM", mapping.tp_group)
    if kind == "track_fusion":
        return RecordedCollective("ALL_REDUCE", {"mean": "AVG", "sum": "SUM"}[op], mapping.fusion_group)
    return RecordedCollective("ALL_GATHER", "NONE", tuple(range(mapping.world_size)))


def test_every_weight_is_a_constant_of_its_name(make_source: MakeSource, tmp_path: Path) -> None:
    folder = checkpoint(make_source, tmp_path, ConvertOptions(world_size=2))
    wanted = {spec.name for spec in rank_specs(engine_config(folder).checkpoint)}
    for network in world_networks(folder):
        names = layer_names(network)
        assert wanted <= set(names)
        assert len(names) == len(set(names))


def test_weights_are_read_where_they_are_mapped(make_source: MakeSource, tmp_path: Path) -> None:
    folder = checkpoint(make_source, tmp_path, ConvertOptions(dtype="bfloat16"))
    [network] = world_networks(folder)
    weights, layers = network.keep[1], network.keep[2]
    mapped = {weights[spec.name].data_ptr() for spec in rank_specs(engine_config(folder).checkpoint)}
    assert mapped - {tensor.data_ptr() for tensor in layers.keep} == set()


def test_inputs_and_outputs_are_those_of_the_table(make_source: MakeSource, tmp_path: Path) -> None:
    folder = checkpoint(make_source, tmp_path, ConvertOptions(world_size=2, dtype="float16"))
    for rank_network in world_networks(folder):
        network = rank_network.network
        tensors = [network.get_input(i) for i in range(network.num_inputs)]
        tensors += [network.get_output(i) for i in range(network.num_outputs)]
        found = {tensor.name: (tensor.dtype.name.lower(), tuple(tensor.shape)) for tensor in tensors}
        names = {"float16": "half", "float32": "float", "int32": "int32"}
        for binding in rank_network.bindings:
            dtype, shape = found.pop(binding.name)
            assert dtype == names[binding.dtype]
            if binding.is_input:
                assert shape == binding.shape
            assert len(shape) == len(binding.shape)
        assert found == {}


@pytest.mark.parametrize("method", ["int8_wo", "int4_wo", "fp8_wo"])
def test_quantised_weights_stay_codes_in_the_network(make_source: MakeSource, tmp_path: Path, method: str) -> None:
    import tensorrt_rtx as trt

    quantization = Quantization(method=method, group_size=32)
    folder = checkpoint(make_source, tmp_path, ConvertOptions(world_size=2, quantization=quantization))
    [network, _] = world_networks(folder)
    types = {}
    for index in range(network.network.num_layers):
        layer = network.network.get_layer(index)
        types[layer.name] = layer.get_output(0).dtype
    stored = {"int8_wo": trt.int8, "int4_wo": trt.int4, "fp8_wo": trt.fp8}[method]
    assert types["transformer.layers.0.attention.qkv.weight"] == stored
    assert types["transformer.layers.0.mlp.fc.weight"] == stored
    assert types["transformer.layers.1.mlp.fc.weight"] == trt.int32  # experts: whole words of codes


def test_experts_whose_codes_fill_no_words_are_refused(make_source: MakeSource, tmp_path: Path) -> None:
    folder = checkpoint(
        make_source, tmp_path, ConvertOptions(quantization=Quantization(method="int8_wo")),
        sparse_feed_forward_hidden_dim=30,
    )  # fmt: skip
    with pytest.raises(EngineError, match="30 inputs of 8 bits do not fill whole 32-bit words"):
        world_networks(folder)


def test_dense_layers_alone_make_no_router(make_source: MakeSource, tmp_path: Path) -> None:
    folder = checkpoint(make_source, tmp_path, ConvertOptions(), **DENSE)
    [network] = world_networks(folder)
    assert not any("router" in name for name in layer_names(network))
