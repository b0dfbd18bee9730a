"""Export: every source in our `pt` layout, with the same numbers, and the folder is a source again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pt_trtllm.checkpoint.artifact import MANIFEST
from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.checkpoint.export import ExportOptions, export, plan_shards
from pt_trtllm.checkpoint.safetensors_io import DeclaredTensor
from pt_trtllm.checkpoint.sources import base, open_source
from pt_trtllm.cli.options import byte_size
from pt_trtllm.config import ModelConfig, RopeScaling
from pt_trtllm.errors import PtError
from pt_trtllm.testing.big_checkpoint import write_big_checkpoint
from pt_trtllm.testing.cases import BASE, CASES
from pt_trtllm.testing.cli import check_cli, refusal
from pt_trtllm.testing.pt_layout import write_pt_layout
from pt_trtllm.testing.reference import build_model, save_checkpoint
from pt_trtllm.testing.tiny_llama import TINY_MODELS, save_tiny_model

pytestmark = pytest.mark.unit
MakeSource = Callable[..., Path]
EXAMPLE = Path(__file__).parents[2] / "examples/tiny-pt"

CHOSEN = (
    "mixed_local_global_dense_sparse", "sum_of_tracks", "qk_norm_without_scale", "pre_scale_norms",
    "pre_residual_and_post_norms", "post_norm_only", "dispatch_and_combine_norms", "all_sparse_uncapped_top_3",
    "one_track_is_tensor_parallel",
)  # fmt: skip
"""Dense and sparse, and every norm there is."""

SMALL = ExportOptions(max_shard_bytes=50_000)
"""Shards of so few bytes that the matrices of one layer's experts lie in several of them."""


@pytest.fixture(scope="module")
def tamm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tamm") / "source"
    save_checkpoint(build_model(BASE), BASE, folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, as the `safetensors` library reads them."""
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("model*.safetensors"):
        tensors.update(load_file(path))
    return tensors


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_converts_alike(first: Path, second: Path, place: Path, world_size: int) -> None:
    """Two sources give the same files of all ranks, byte by byte."""
    folders = [place / f"{world_size}-{i}" for i in range(2)]
    configs = [
        convert(source, target, ConvertOptions(world_size=world_size))
        for source, target in zip((first, second), folders, strict=True)
    ]
    assert configs[0] == configs[1]
    for rank in range(world_size):
        ours, theirs = ((folder / f"rank{rank}.safetensors").read_bytes() for folder in folders)
        assert ours == theirs


@pytest.mark.parametrize("case", [case for case in CASES if case.name in CHOSEN], ids=lambda case: case.name)
def test_a_tamm_folder_is_spelled_as_documented_and_converts_alike(
    make_source: MakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Any
) -> None:
    source = make_source(**case.options)
    with monkeypatch.context() as patch:
        patch.setattr(base, "BLOCK_BYTES", 4000)  # blocks end within matrices, and within q, k and v
        export(source, tmp_path / "exported", SMALL)
    write_pt_layout(source, tmp_path / "expected")
    assert_same_tensors(weights(tmp_path / "exported"), weights(tmp_path / "expected"))
    assert open_source(tmp_path / "exported", "pt").config == open_source(tmp_path / "expected").config
    for world_size in (1, 2, 4):
        assert_converts_alike(source, tmp_path / "exported", tmp_path, world_size)


def test_the_example_exported_is_itself(tmp_path: Path) -> None:
    """Also an export of an export; tokenizer and configuration are the example's."""
    export(EXAMPLE, tmp_path / "once", ExportOptions(max_shard_bytes=600_000))
    export(tmp_path / "once", tmp_path / "twice")
    for folder in (tmp_path / "once", tmp_path / "twice"):
        assert_same_tensors(weights(folder), weights(EXAMPLE))
        assert open_source(folder).config == open_source(EXAMPLE).config
        config, original = (json.loads((place / "config.json").read_text()) for place in (folder, EXAMPLE))
        assert config == original
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (folder / name).read_bytes() == (EXAMPLE / name).read_bytes()


def test_every_option_of_a_configuration_is_written(tmp_path: Path) -> None:
    """Those that neither the reference nor the example has: biases, scaled positions, several end tokens."""
    model = ModelConfig(
        vocab_size=40, num_hidden_layers=4, hidden_size=16, num_attention_heads=2, head_dim=8, intermediate_size=24,
        num_tracks=2, sync_interval=2, num_key_value_heads=1, attention_pattern=("local_nope", "global_rope"),
        attention_window=7, qk_norm="scaled", attention_bias=True, attention_out_bias=True, mlp_bias=True,
        feed_forward_pattern=("dense", "sparse"), moe_intermediate_size=8, num_experts=3, num_experts_per_tok=2,
        rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.2),
        bos_token_id=1, eos_token_id=(2, 3), pad_token_id=0, combine_op="sum", post_norm="pre_scale_rms_norm",
    )  # fmt: skip
    write_big_checkpoint(tmp_path / "source", 0, model, distinct=True)
    export(tmp_path / "source", tmp_path / "exported", SMALL)
    assert_same_tensors(weights(tmp_path / "exported"), weights(tmp_path / "source"))
    config = json.loads((tmp_path / "exported/config.json").read_text())
    named = {"model_type": "parallel_track", "architectures": ["PTForCausalLM"], "dtype": "bfloat16"}
    assert {name: config.pop(name) for name in named} == named
    assert ModelConfig.from_dict(config) == model
    assert config["eos_token_id"] == [2, 3]
    assert config["rope_scaling"]["attention_factor"] == 1.2


@pytest.mark.parametrize("name", ["llama-all-biases-tied", "qwen3"])
def test_a_llama_folder_is_the_case_of_one_track(tmp_path: Path, name: str) -> None:
    state = save_tiny_model(tmp_path / "source", *TINY_MODELS[name])
    generation = {"eos_token_id": [2, 7], "temperature": 0.6}
    (tmp_path / "source/generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "source/chat_template.jinja").write_text("{{ messages }}")
    exported = export(tmp_path / "source", tmp_path / "exported")
    expected = {key.replace("model.layers.", "model.tracks.0.layers."): value for key, value in state.items()}
    if exported.model.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert_same_tensors(weights(tmp_path / "exported"), expected)
    assert exported.model.eos_token_id == (2, 7)
    assert json.loads((tmp_path / "exported/generation_config.json").read_text()) == generation
    assert (tmp_path / "exported/chat_template.jinja").read_text() == "{{ messages }}"
    for world_size in (1, 2):
        assert_converts_alike(tmp_path / "source", tmp_path / "exported", tmp_path, world_size)


@pytest.mark.parametrize("change", [0.0, 1.0], ids=["equal_to_the_embedding", "another_than_the_embedding"])
def test_a_head_of_its_own_is_written_only_where_it_differs(tamm_folder: Path, tmp_path: Path, change: float) -> None:
    tensors = load_file(tamm_folder / "model.safetensors")
    tensors["output_transform.weight"] = tensors["embedding.weight"] + change
    (tmp_path / "source").mkdir()
    save_file(tensors, tmp_path / "source/model.safetensors")
    (tmp_path / "source/config.json").write_bytes((tamm_folder / "config.json").read_bytes())
    exported = export(tmp_path / "source", tmp_path / "exported")
    assert exported.model.tie_word_embeddings == (not change)
    head = weights(tmp_path / "exported").get("lm_head.weight")
    assert (head is None) if not change else torch.equal(head, tensors["output_transform.weight"])  # type: ignore[arg-type]
    assert_converts_alike(tmp_path / "source", tmp_path / "exported", tmp_path, 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_type_is_converted_once(tmp_path: Path, dtype: str) -> None:
    exported = export(EXAMPLE, tmp_path / "exported", ExportOptions(dtype=dtype))
    expected = {name: value.to(getattr(torch, dtype)) for name, value in weights(EXAMPLE).items()}
    assert_same_tensors(weights(tmp_path / "exported"), expected)
    assert exported.dtype == dtype
    assert json.loads((tmp_path / "exported/config.json").read_text())["dtype"] == dtype


def test_shards_keep_to_their_size_and_the_index_names_every_tensor(tmp_path: Path) -> None:
    exported = export(EXAMPLE, tmp_path / "exported", ExportOptions(max_shard_bytes=300_000))
    index = json.loads((tmp_path / "exported/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "exported").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(exported.num_files)]
    assert len(files) > 5
    total = 0
    for file in files:
        tensors = load_file(tmp_path / "exported" / file)
        assert {index["weight_map"][name] for name in tensors} == {file}
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        assert num_bytes <= 300_000 or len(tensors) == 1
        total += num_bytes
    assert index["metadata"]["total_size"] == total == exported.num_bytes
    assert len(index["weight_map"]) == len(weights(EXAMPLE))


def test_weights_that_fit_make_one_file_without_an_index() -> None:
    tensors = [DeclaredTensor(name, torch.float32, (10,)) for name in "abc"]
    assert list(plan_shards(tensors, 120)) == ["model.safetensors"]
    assert [len(shard) for shard in plan_shards(tensors, 119).values()] == [2, 1]
    with pytest.raises(PtError, match="make 501 files, expected at most 500; give a larger --max-shard-size"):
        plan_shards([DeclaredTensor(str(i), torch.float32, (10,)) for i in range(501)], 1)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("512MiB", 512 << 20), ("100000", 100_000), ("3 kb", 3000), ("2G", 2 * 10**9)],
)
def test_sizes_are_written_as_hugging_face_writes_them(text: str, size: int) -> None:
    assert byte_size(text) == size


def test_an_interrupted_export_leaves_nothing(tamm_folder: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(tamm_folder, tmp_path / "exported", SMALL, interrupt)
    assert list(tmp_path.iterdir()) == []


def test_damaged_weights_leave_nothing_and_keep_what_was_there(make_source: MakeSource, tmp_path: Path) -> None:
    source, target = make_source(), tmp_path / "place/exported"
    tensors = load_file(source / "model.safetensors")
    tensors["output_norm.weight"][3] = float("nan")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(PtError, match="holds nan"):
        export(source, target)
    assert list(target.parent.iterdir()) == []
    export(EXAMPLE, target)
    with pytest.raises(PtError, match="holds nan"):
        export(source, target, ExportOptions(force=True))
    assert [path.name for path in target.parent.iterdir()] == ["exported"]
    assert_same_tensors(weights(target), weights(EXAMPLE))


def test_values_beyond_float16_are_refused(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source()
    tensors = load_file(source / "model.safetensors")
    tensors["output_norm.weight"][3] = 1e5
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(PtError, match="beyond float16's 65504; choose --dtype bfloat16"):
        export(source, tmp_path / "exported", ExportOptions(dtype="float16"))


def test_the_command_exports_and_inspect_says_what_the_folder_is(tmp_path: Path) -> None:
    target = tmp_path / "exported"
    command = ("export", "--model_dir", EXAMPLE, "--to", "pt", "--output_dir", target)
    done = check_cli(*command, "--max-shard-size", "600KB")
    assert "4 tracks x 4 layers, bfloat16" in done.stdout
    assert "with its tokenizer" in done.stdout
    (target / "chat_template.jinja").write_text("{{ messages }}")  # a user's own: still a source
    info = json.loads(check_cli("inspect", target, "--json", "--verify", "--tensors").stdout)
    assert (info["kind"], info["format"], info["verified"]) == ("source checkpoint", "pt", True)
    assert info["tensors"].keys() == {path.name for path in target.glob("*.safetensors")}
    assert "exists and is not empty" in refusal(*command)
    check_cli(*command, "--force")
    assert (target / "model.safetensors").is_file()
    data = bytearray((target / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (target / "model.safetensors").write_bytes(data)
    assert "the file was changed" in refusal("inspect", target, "--verify")


def test_what_cannot_be_exported_is_refused_with_one_line(tmp_path: Path) -> None:
    target = tmp_path / "exported"
    for name, file, text in (("mamba", "config.json", '{"model_type": "mamba"}'), ("foreign", "notes.txt", "mine")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
    convert(EXAMPLE, tmp_path / "converted", ConvertOptions())
    for options, message in (
        ({"--to": "gguf"}, "'gguf' is not 'pt'"),
        ({"--source": "gguf"}, "'gguf' is not one of"),
        ({"--source": "tamm"}, "unknown keys"),
        ({"--dtype": "int8"}, "'int8' is not one of"),
        ({"--max-shard-size": "5 apples"}, "is no size, expected a number of bytes such as 5GB"),
        ({"--max-shard-size": "0GB"}, "'0GB' is no size"),
        ({"--model-dir": tmp_path / "mamba"}, "model_type 'mamba' is none"),
        ({"--model-dir": tmp_path / "converted"}, "holds what pt-trtllm has written (checkpoint)"),
        ({"--output-dir": tmp_path / "foreign"}, "was not written by pt-trtllm"),
        ({"--output-dir": EXAMPLE}, "which is being read"),
    ):
        given = {"--model-dir": EXAMPLE, "--to": "pt", "--output-dir": target, **options}
        assert message in refusal("export", *(word for option in given.items() for word in option), "--force")
    assert "Missing option '--to'" in refusal("export", "--model-dir", EXAMPLE, "--output-dir", target)
    assert not target.exists()


def test_a_folder_that_build_wants_is_named(tmp_path: Path) -> None:
    export(EXAMPLE, tmp_path / "exported")
    line = refusal("build", "--checkpoint-dir", tmp_path / "exported", "--output-dir", tmp_path / "engine")
    assert "its manifest says 'source checkpoint'; expected the checkpoint that `pt-trtllm convert` writes" in line
    assert (tmp_path / "exported" / MANIFEST).is_file()
