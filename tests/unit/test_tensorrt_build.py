"""Real engines, serialized by TensorRT-RTX for GPUs that are not here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pt_trtllm.checkpoint.artifact import MANIFEST, file_digest
from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.checkpoint.quantize import Quantization
from pt_trtllm.cli.inspect import command as inspect_command
from pt_trtllm.config import ModelConfig
from pt_trtllm.engine.build import BuildOptions
from pt_trtllm.engine.build import build as build_engine
from pt_trtllm.engine.bundle import BackendOptions, BuildLimits, open_bundle
from pt_trtllm.engine.tensorrt.gpu import present_gpu
from pt_trtllm.testing.big_checkpoint import write_big_checkpoint
from pt_trtllm.testing.cli import refusal

rtx = pytest.importorskip("tensorrt_rtx", reason="needs pip install '.[rtx]'")

pytestmark = pytest.mark.unit

MakeSource = Callable[..., Path]
TARGETS, ONE = ("sm80", "sm89", "sm120"), ("sm89",)
FP8_TARGETS = ("sm89", "sm120")
TWO_LAYERS = {"num_layers_per_track": 2, "num_layers_per_track_per_sync_point": 1}
"""A windowed layer with rotary positions, a global one without; the sparse models' layers are both sparse."""
KINDS = {
    "dense": {"feed_forward_layer_pattern": ["dense"]},
    "moe": {"feed_forward_layer_pattern": ["sparse"]},
    "both": {"feed_forward_layer_pattern": ["dense", "sparse"]},
}


def make_checkpoint(
    make_source: MakeSource, tmp_path: Path, world_size: int, dtype: str, kind: str = "dense", method: str = "none"
) -> Path:
    quantization = Quantization(method=method, group_size=32)
    source = make_source(**TWO_LAYERS, **KINDS[kind])
    options = ConvertOptions(world_size=world_size, dtype=dtype, quantization=quantization)
    convert(source, tmp_path / "checkpoint", options)
    return tmp_path / "checkpoint"


def build(checkpoint: Path, engine: Path, targets: tuple[str, ...] = TARGETS) -> None:
    options = BuildOptions(
        backend="tensorrt",
        limits=BuildLimits(max_seq_len=64, max_batch_size=4),
        backend_options=BackendOptions(targets=targets),
    )
    build_engine(checkpoint, engine, options)


def shown(engine: Path) -> dict[str, Any]:
    done = CliRunner().invoke(inspect_command, [str(engine), "--json", "--verify"])
    assert done.exit_code == 0, done.output
    info = json.loads(done.output)
    assert isinstance(info, dict)
    return info


@pytest.mark.parametrize(
    ("world_size", "dtype", "kind", "method", "targets"),
    [
        (1, "float16", "moe", "none", TARGETS),
        (1, "bfloat16", "moe", "int4_wo", TARGETS),
        (2, "bfloat16", "moe", "none", ONE),
        (2, "float16", "dense", "int8_wo", ONE),
        (4, "bfloat16", "dense", "none", ONE),
    ],
)
def test_engines_of_every_rank_are_built_for_three_generations_of_gpus(
    make_source: MakeSource, tmp_path: Path, world_size: int, dtype: str, kind: str, method: str,
    targets: tuple[str, ...],
) -> None:  # fmt: skip
    """What a rank is told to build does not depend on how many there are."""
    build(make_checkpoint(make_source, tmp_path, world_size, dtype, kind, method), tmp_path / "engine", targets)
    info = shown(tmp_path / "engine")
    assert info["backend_config"]["library"] == "tensorrt_rtx"
    assert info["backend_config"]["version"] == rtx.__version__
    assert info["backend_config"]["targets"] == list(targets)
    tensors = info["backend_config"]["tensors"]
    assert tensors["input_ids"] == "input int32, context [1, 1..64], generation [1..4, 1]"
    heads = 2 * (4 // world_size)  # two key/value heads in every local track
    assert tensors["present_key_1"] == (
        f"output {dtype}, context [1, {heads}, 128, 16], generation [1..4, {heads}, 128, 16], in place of past_key_1"
    )
    for rank in range(world_size):
        # A plan holds compiled kernels: far more than a header, and more than this rank's weights.
        assert info["files"][f"rank{rank}.engine"] > 1 << 20
        assert info["ranks"][rank]["layers"] > 100
    config, _ = open_bundle(tmp_path / "engine")
    assert config.to_json()["backend_config"]["targets"] == list(targets)


def test_an_engine_of_float8_weights_is_built_for_the_gpus_that_have_it(
    make_source: MakeSource, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(make_source, tmp_path, 1, "bfloat16", "both", "fp8")
    command = ("build", "--checkpoint-dir", checkpoint, "--output-dir", tmp_path / "engine", "--backend", "tensorrt")
    assert "fp8 (e4m3), which sm80 does not have" in refusal(*command, "--target", "sm80,sm89")
    build(checkpoint, tmp_path / "engine", FP8_TARGETS)
    info = shown(tmp_path / "engine")
    assert (info["quantization"], info["backend_config"]["targets"]) == ("fp8", list(FP8_TARGETS))
    assert info["files"]["rank0.engine"] > 1 << 20


def test_running_an_engine_without_a_gpu_is_refused(make_source: MakeSource, tmp_path: Path) -> None:
    if present_gpu() is not None:
        pytest.skip("there is a GPU here")
    checkpoint, engine = make_checkpoint(make_source, tmp_path, 1, "float16"), tmp_path / "engine"
    line = refusal("build", "--checkpoint-dir", checkpoint, "--output-dir", engine, "--backend", "tensorrt")
    assert "no GPU here to build for: name the ones that will run the engine" in line
    build(checkpoint, engine, ONE)
    assert "the driver shows none here" in refusal("run", "--engine-dir", engine, "--input-ids", "[[1]]")
    changed = json.loads((engine / "config.json").read_text())
    changed["backend_config"]["version"] = "1.0.0"
    rewrite(engine, changed)
    line = refusal("run", "--engine-dir", engine, "--input-ids", "[[1]]")
    assert f"built with tensorrt_rtx 1.0.0, this machine has {rtx.__version__}" in line


def rewrite(engine: Path, config: dict[str, Any]) -> None:
    """Another config.json, with the digest that belongs to it."""
    (engine / "config.json").write_text(json.dumps(config))
    manifest = json.loads((engine / MANIFEST).read_text())
    size = (engine / "config.json").stat().st_size
    manifest["files"]["config.json"] = {"bytes": size, "sha256": file_digest(engine / "config.json")}
    (engine / MANIFEST).write_text(json.dumps(manifest))


def test_what_cannot_be_built_is_refused_and_leaves_nothing(make_source: MakeSource, tmp_path: Path) -> None:
    checkpoint, engine = make_checkpoint(make_source, tmp_path, 2, "float16"), tmp_path / "engine"
    command = ("build", "--checkpoint-dir", checkpoint, "--output-dir", engine, "--backend", "tensorrt")
    assert "cannot build for sm90 (it can: sm75, sm80" in refusal(*command, "--target", "sm89,sm90")
    assert "expected compute capabilities like sm89" in refusal(*command, "--target", "ampere")
    assert "backend cpu builds for no GPU" in refusal(*command[:-1], "cpu", "--target", "sm89")
    assert not engine.exists()
    (checkpoint / "rank1.safetensors").write_bytes(b"x" * (checkpoint / "rank1.safetensors").stat().st_size)
    line = refusal(*command, "--target", "sm89")
    assert "rank1.safetensors: sha256 is" in line
    assert not engine.exists()


def test_a_rank_whose_weights_are_many_needs_less_than_twice_them(tmp_path: Path) -> None:
    """Anonymous memory: what the machine must have. Mapped pages of the checkpoint can be dropped at any time."""
    model = ModelConfig(
        vocab_size=32000, num_hidden_layers=2, hidden_size=2048, num_attention_heads=8, num_key_value_heads=2,
        head_dim=128, intermediate_size=5632,
    )  # fmt: skip
    write_big_checkpoint(tmp_path / "source", 0, model, distinct=True)
    convert(tmp_path / "source", tmp_path / "checkpoint", ConvertOptions())
    build(tmp_path / "checkpoint", tmp_path / "engine")
    [rank] = shown(tmp_path / "engine")["ranks"]
    assert rank["weight_bytes"] > 400 << 20
    assert rank["peak_anonymous_bytes"] - rank["start_anonymous_bytes"] < 2 * rank["weight_bytes"]
