"""Conversion: nothing is lost, nothing changes that was not asked to, whatever the format and the world."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.checkpoint.quantize import Quantization, dequantize
from pt_trtllm.checkpoint.rank_files import open_checkpoint
from pt_trtllm.testing.cases import CASES, VOCAB_SIZE
from pt_trtllm.testing.pt_layout import write_pt_layout

pytestmark = pytest.mark.unit
MakeSource = Callable[..., Path]


def load_ranks(folder: Path, world_size: int) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_whole_tracks_reassemble_bitwise_to_the_source(
    make_source: MakeSource, tmp_path: Path, world_size: int
) -> None:
    source_dir = make_source()
    convert(source_dir, tmp_path / "out", ConvertOptions(world_size=world_size))
    source, ranks = load_file(source_dir / "model.safetensors"), load_ranks(tmp_path / "out", world_size)

    def tracks(name: str) -> torch.Tensor:
        parts = [rank[name] for rank in ranks]
        return torch.cat(parts) if world_size < 4 else torch.stack(parts)

    layer, theirs = "transformer.layers.3.", "layers.segment_1.layer_1."
    qkv = source[theirs + "attention.qkv_transform.fused_linear.weight"].transpose(1, 2)
    assert torch.equal(tracks(layer + "attention.qkv.weight"), qkv)
    dense = source[theirs + "attention.output_transform.weight"].transpose(1, 2)
    assert torch.equal(tracks(layer + "attention.dense.weight"), dense)
    assert torch.equal(tracks(layer + "input_layernorm.weight"), source[theirs + "attention.norm.weight"])
    router = source[theirs + "feed_forward.router.input_transform.weight"].transpose(1, 2)
    assert torch.equal(tracks(layer + "mlp.router.weight"), router)
    up, gate = (source[f"{theirs}feed_forward.experts.hidden_transform.linear_{i}.weight"] for i in (1, 0))
    assert torch.equal(tracks(layer + "mlp.fc.weight"), torch.cat((up, gate), dim=3).transpose(2, 3))
    dense_gate = source["layers.segment_0.layer_0.feed_forward.hidden_transform.linear_0.weight"].transpose(1, 2)
    assert torch.equal(tracks("transformer.layers.0.mlp.fc.weight"), dense_gate)
    for rank in ranks:
        assert torch.equal(rank["transformer.vocab_embedding.weight"], source["embedding.weight"])
    if world_size > 1:
        head = torch.cat([rank["lm_head.weight"] for rank in ranks])
        assert torch.equal(head[:VOCAB_SIZE], source["embedding.weight"])
        assert not head[VOCAB_SIZE:].any()


def test_a_track_split_over_ranks_reassembles_bitwise(make_source: MakeSource, tmp_path: Path) -> None:
    source_dir = make_source(num_tracks=1, feed_forward_layer_pattern=["dense", "sparse"])
    convert(source_dir, tmp_path / "out", ConvertOptions(world_size=2))
    source, ranks = load_file(source_dir / "model.safetensors"), load_ranks(tmp_path / "out", 2)
    qkv = source["layers.segment_0.layer_0.attention.qkv_transform.fused_linear.weight"][0].t()
    halves = [rank["transformer.layers.0.attention.qkv.weight"].split((32, 16, 16)) for rank in ranks]
    assert torch.equal(torch.cat([half[part] for part in range(3) for half in halves]), qkv)
    dense = source["layers.segment_0.layer_0.attention.output_transform.weight"][0].t()
    assert torch.equal(torch.cat([rank["transformer.layers.0.attention.dense.weight"] for rank in ranks], dim=1), dense)
    for expert in range(5):
        fc = [rank["transformer.layers.1.mlp.fc.weight"][expert].chunk(2) for rank in ranks]
        for half, theirs in enumerate(("linear_1", "linear_0")):  # up, then gate
            matrix = source[f"layers.segment_0.layer_1.feed_forward.experts.hidden_transform.{theirs}.weight"][
                0, expert
            ].t()
            assert torch.equal(torch.cat([chunks[half] for chunks in fc]), matrix)
        down = [rank["transformer.layers.1.mlp.proj.weight"][expert] for rank in ranks]
        matrix = source["layers.segment_0.layer_1.feed_forward.experts.output_transform.weight"][0, expert].t()
        assert torch.equal(torch.cat(down, dim=1), matrix)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_pt_layout_converts_to_the_same_bytes(make_source: MakeSource, tmp_path: Path, case: object) -> None:
    source_dir = make_source(**case.options)  # type: ignore[attr-defined]
    write_pt_layout(source_dir, tmp_path / "pt", num_shards=3)
    world_size = case.world_sizes[-1]  # type: ignore[attr-defined]
    first = convert(source_dir, tmp_path / "a", ConvertOptions(world_size=world_size))
    second = convert(tmp_path / "pt", tmp_path / "b", ConvertOptions(world_size=world_size))
    assert first == second
    for rank in range(world_size):
        name = f"rank{rank}.safetensors"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("file_name", ["model.pt", "pytorch_model.bin"])
def test_pickled_state_dicts_convert_to_the_same_bytes(make_source: MakeSource, tmp_path: Path, file_name: str) -> None:
    source_dir = make_source()
    convert(source_dir, tmp_path / "a", ConvertOptions())
    torch.save(load_file(source_dir / "model.safetensors"), source_dir / file_name)
    (source_dir / "model.safetensors").unlink()
    convert(source_dir, tmp_path / "b", ConvertOptions())
    assert (tmp_path / "a/rank0.safetensors").read_bytes() == (tmp_path / "b/rank0.safetensors").read_bytes()


def test_a_head_that_differs_from_the_embedding_is_kept(make_source: MakeSource, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source_dir = make_source()
    tensors = load_file(source_dir / "model.safetensors")
    tensors["output_transform.weight"] = tensors["output_transform.weight"] + 1
    save_file(tensors, source_dir / "model.safetensors")
    config = convert(source_dir, tmp_path / "out", ConvertOptions(world_size=2))
    assert not config.model.tie_word_embeddings
    head = torch.cat([rank["lm_head.weight"] for rank in load_ranks(tmp_path / "out", 2)])
    assert torch.equal(head[:VOCAB_SIZE], tensors["output_transform.weight"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_type_is_converted_once(make_source: MakeSource, tmp_path: Path, dtype: str) -> None:
    source_dir = make_source()
    convert(source_dir, tmp_path / "out", ConvertOptions(dtype=dtype))
    found = load_ranks(tmp_path / "out", 1)[0]["transformer.vocab_embedding.weight"]
    expected = load_file(source_dir / "model.safetensors")["embedding.weight"].to(getattr(torch, dtype))
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("quantization", "step"),
    [
        (Quantization(method="int8_wo"), 1 / 127),
        (Quantization(method="int4_wo", group_size=32), 1 / 7),
        (Quantization(method="fp8_wo"), 1 / 27),  # half of e4m3's step below 448, which is 32
    ],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_quantised_weights_are_near_and_independent_of_the_world(
    make_source: MakeSource, tmp_path: Path, quantization: Quantization, step: float, world_size: int
) -> None:
    source_dir = make_source(num_tracks=1, sparse_feed_forward_hidden_dim=64, dense_feed_forward_hidden_dim=128)
    convert(source_dir, tmp_path / "out", ConvertOptions(world_size=world_size, quantization=quantization))
    base = "transformer.layers.0.attention.dense."
    parts = []
    for rank in load_ranks(tmp_path / "out", world_size):
        mine = {name.removeprefix(base): value for name, value in rank.items() if name.startswith(base)}
        parts.append(dequantize(mine))
    found = torch.cat(parts, dim=1)
    source = load_file(source_dir / "model.safetensors")
    expected = source["layers.segment_0.layer_0.attention.output_transform.weight"][0].t()
    limit = expected.abs().amax(dim=1, keepdim=True) * step
    assert ((found - expected).abs() <= limit).all()
    convert(source_dir, tmp_path / "whole", ConvertOptions(quantization=quantization))
    whole = {k.removeprefix(base): v for k, v in load_ranks(tmp_path / "whole", 1)[0].items() if k.startswith(base)}
    assert torch.equal(found, dequantize(whole))


def test_config_json_speaks_tensorrt_llm(make_source: MakeSource, tmp_path: Path) -> None:
    convert(make_source(), tmp_path / "out", ConvertOptions(world_size=4, dtype="bfloat16"))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architecture"] == "PTForCausalLM"
    assert config["dtype"] == "bfloat16"
    assert config["mapping"] == {"world_size": 4, "tp_size": 4, "pp_size": 1}
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_size"]) == (16, 8, 16)
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (4, 64, VOCAB_SIZE)
    assert config["position_embedding_type"] == "rope_gptj"
    assert config["logits_dtype"] == "float32"


@pytest.mark.parametrize("method", ["fp8_wo", "fp8"])
def test_float8_weights_and_scales_have_tensorrt_llms_names_and_types(
    make_source: MakeSource, tmp_path: Path, method: str
) -> None:
    convert(make_source(), tmp_path / "out", ConvertOptions(world_size=4, quantization=Quantization(method=method)))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization"] == {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
    [rank, *_] = load_ranks(tmp_path / "out", 4)
    weight = rank["transformer.layers.0.attention.qkv.weight"]
    scale = rank["transformer.layers.0.attention.qkv.per_channel_scale"]
    assert (weight.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert scale.shape == weight.shape[:1]
    assert (weight.float().abs().amax(dim=1) == 448).all()  # every row uses the whole range
    assert rank["transformer.layers.1.mlp.fc.weight"].dtype == torch.float8_e4m3fn
    assert rank["transformer.vocab_embedding.weight"].dtype == torch.float32


def test_the_manifest_names_every_file_with_its_digest(make_source: MakeSource, tmp_path: Path) -> None:
    convert(make_source(), tmp_path / "out", ConvertOptions(world_size=2))
    _, manifest = open_checkpoint(tmp_path / "out")
    assert set(manifest["files"]) == {"config.json", "rank0.safetensors", "rank1.safetensors"}
    assert all(len(entry["sha256"]) == 64 for entry in manifest["files"].values())


def test_reading_the_references_own_json_fills_in_its_defaults(make_source: MakeSource, tmp_path: Path) -> None:
    source_dir = make_source()
    raw = json.loads((source_dir / "config.json").read_text())
    raw["__tamm_type__"] = "tamm:module_configs:AFMParallelTrackMoEConfig"
    (source_dir / "config.json").write_text(json.dumps(raw))
    config = convert(source_dir, tmp_path / "out", ConvertOptions())
    assert config.model.rope_theta == 500000.0
    assert config.model.router_logits_cap == 50.0
    assert config.model.num_experts_per_tok == 2


MEASURE = """
import resource, sys
from pathlib import Path
from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.checkpoint.export import ExportOptions, export
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(Path(sys.argv[1]), Path(sys.argv[2]) / "ranks", ConvertOptions(world_size=2))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
export(Path(sys.argv[1]), Path(sys.argv[2]) / "pt", ExportOptions(max_shard_bytes=100_000_000))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """470 MB, largest tensor 160 MB, are converted and exported within 150 MB beyond the interpreter's own."""
    from pt_trtllm.testing.big_checkpoint import write_big_checkpoint

    size = write_big_checkpoint(tmp_path / "big", num_bytes=500_000_000)
    assert size > 450_000_000
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "big"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    for grown in map(int, done.stdout.split()):
        assert grown < 150 * 1024, f"{grown // 1024} MB"
