"""Whatever stands in the files of a checkpoint or an engine, reading them ends soon, with one line of ours."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pt_trtllm.checkpoint.artifact import MANIFEST
from pt_trtllm.cli.main import cli
from pt_trtllm.errors import PtError

pytestmark = pytest.mark.unit

EXAMPLE = Path(__file__).parents[2] / "examples/tiny-pt"
DEEP = json.loads("[" * 850 + "]" * 850)
"""Nearly as deep as Python's JSON goes: whoever walks it with more than one call for each level fails."""
HOSTILE: tuple[Any, ...] = (
    float("inf"), float("nan"), 10**400, -1, 0, 2**31, 2**63, 2**64, 10**9, 1e300, 1.5, True, None, "x", "\ud800",
    "1" * 5000, [], {}, [1], [[]], [None], {"a": 1}, ["sparse"], DEEP,
)  # fmt: skip
NESTED = b"[" * 200_000 + b"]" * 200_000
TAMM = {
    "num_tracks": 2, "vocab_size": 100, "num_layers_per_track": 4, "num_layers_per_track_per_sync_point": 2,
    "hidden_dim": 64, "attention_hidden_dim": 32, "num_heads": 4, "dense_feed_forward_hidden_dim": 96,
    "sparse_feed_forward_hidden_dim": 48, "num_experts": 4, "num_experts_per_token": 2, "eos_token_id": 3,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
    "intermediate_size": 96, "max_position_embeddings": 512, "eos_token_id": [1, 2], "layer_types": None,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    assert run("convert", "--model-dir", EXAMPLE, "--output-dir", folder / "checkpoint") is None
    assert run("build", "--checkpoint-dir", folder / "checkpoint", "--output-dir", folder / "engine") is None
    return folder


def run(*args: object) -> BaseException | None:
    """What a command ended with; anything but an error of ours fails the test."""
    result = CliRunner().invoke(cli, [str(arg) for arg in args], standalone_mode=False)
    if result.exception is not None and not isinstance(result.exception, PtError):
        raise result.exception
    return result.exception


def refused(*args: object, match: str) -> None:
    error = run(*args)
    assert error is not None
    assert match in str(error), error
    assert len(str(error)) < 1000


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    for key in data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        yield data, key
        yield from places(data[key])


def changed(data: Any, value: Any, rng: random.Random) -> Any:
    """A copy with this value in a random place."""
    copied = copy.deepcopy(data)
    target, key = rng.choice(list(places(copied)))
    target[key] = value
    return copied


def link(source: Path, target: Path, **own: bytes) -> Path:
    """The folder again, with other contents in some of its files, which its manifest knows."""
    target.mkdir()
    for path in source.rglob("*"):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir()
        elif path.name not in own:
            place.symlink_to(path)
    for name, data in own.items():
        (target / name).write_bytes(data)
    if MANIFEST not in own and (source / MANIFEST).is_file():
        manifest = json.loads((source / MANIFEST).read_text())
        for name, data in own.items():
            manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (target / MANIFEST).unlink()
        (target / MANIFEST).write_text(json.dumps(manifest))
    return target


def header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        found: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return found


def with_header(data: Any, length: int | None = None) -> bytes:
    text = data if isinstance(data, bytes) else json.dumps(data).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:12])
def test_hostile_values_in_any_file(made: Path, tmp_path: Path, value: Any) -> None:
    rng = random.Random(repr(value))
    example, checkpoint, engine = EXAMPLE, made / "checkpoint", made / "engine"
    for index, (source, name) in enumerate(
        [(example, "config.json"), (checkpoint, "config.json"), (engine, "config.json"), (engine, MANIFEST)] * 3
    ):
        data = json.dumps(changed(json.loads((source / name).read_text()), value, rng)).encode()
        folder = link(source, tmp_path / str(index), **{name: data})
        run("inspect", folder, "--json")
        if source == engine:
            run("deploy", "--engine-dir", folder, "--model-repository", tmp_path / "r", "--force")
    for index, config in enumerate([TAMM, LLAMA] * 3):
        folder = tmp_path / f"source{index}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(changed(config, value, rng)))
        (folder / "model.safetensors").symlink_to(EXAMPLE / "model.safetensors")
        run("convert", "--model-dir", folder, "--output-dir", tmp_path / "o", "--force")
    for index in range(3):
        data = with_header(changed(header(EXAMPLE / "model.safetensors"), value, rng))
        folder = link(EXAMPLE, tmp_path / f"header{index}", **{"model.safetensors": data})
        run("convert", "--model-dir", folder, "--output-dir", tmp_path / "o", "--force")


@pytest.mark.parametrize("offset", ["1e400", "1" * 5000, "[]", "-1", "true", "9223372036854775808", '"0"', "0.5"])
def test_an_offset_that_is_none(tmp_path: Path, offset: str) -> None:
    data = with_header(f'{{"x": {{"dtype": "F32", "shape": [1], "data_offsets": [{offset}, 4]}}}}'.encode())
    folder = link(EXAMPLE, tmp_path / "source", **{"model.safetensors": data + bytes(4)})
    refused("convert", "--model-dir", folder, "--output-dir", tmp_path / "o", match="safetensors")


def test_a_shape_of_millions_of_large_numbers(tmp_path: Path) -> None:
    """To multiply them would take hours."""
    data = with_header({"x": {"dtype": "F32", "shape": [2**62] * 2_000_000, "data_offsets": [0, 4]}})
    folder = link(EXAMPLE, tmp_path / "source", **{"model.safetensors": data + bytes(4)})
    refused("convert", "--model-dir", folder, "--output-dir", tmp_path / "o", match="'x' has 2000000 dimensions")


@pytest.mark.parametrize("length", [0, 2**63, 2**64 - 1, 10**9])
def test_a_header_length_that_is_none(tmp_path: Path, length: int) -> None:
    folder = link(EXAMPLE, tmp_path / "source", **{"model.safetensors": with_header({}, length)})
    refused("convert", "--model-dir", folder, "--output-dir", tmp_path / "o", match="not a safetensors file")


def test_what_is_nested_without_end(made: Path, tmp_path: Path) -> None:
    convert = ("--output-dir", tmp_path / "o")
    folder = link(EXAMPLE, tmp_path / "a", **{"config.json": NESTED})
    refused("convert", "--model-dir", folder, *convert, match="config.json: cannot be read as JSON: it is nested")
    folder = link(EXAMPLE, tmp_path / "b", **{"model.safetensors": with_header(NESTED)})
    refused("convert", "--model-dir", folder, *convert, match="its header is not JSON")
    folder = link(EXAMPLE, tmp_path / "c", **{"model.safetensors.index.json": NESTED})
    refused("convert", "--model-dir", folder, *convert, match="model.safetensors.index.json: cannot be read")
    folder = link(made / "engine", tmp_path / "d", **{"config.json": NESTED})
    refused("deploy", "--engine-dir", folder, "--model-repository", tmp_path / "o", match="it is nested")
    refused("run", "--engine-dir", folder, "--input-ids", "[1]", match="it is nested")
    refused("run", "--engine-dir", made / "engine", "--input-ids", NESTED.decode(), match="--input-ids: not valid JSON")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    folder = link(EXAMPLE, tmp_path / "a", **{"config.json": b'{"model_type": "\xff"}'})
    refused("convert", "--model-dir", folder, "--output-dir", tmp_path / "o", match="cannot be read as JSON")


def test_shards_of_impossible_names(tmp_path: Path) -> None:
    for index, name in enumerate(("x" * 5000, "\ud800", "a\0b", "../x", "")):
        shards = json.dumps({"weight_map": {"x": name}}).encode()
        folder = link(EXAMPLE, tmp_path / str(index), **{"model.safetensors.index.json": shards})
        refused("convert", "--model-dir", folder, "--output-dir", tmp_path / "o", match="model.safetensors.index.json")


def test_sizes_that_no_model_has_are_refused_at_once(made: Path, tmp_path: Path) -> None:
    for index, config in enumerate(
        [{**LLAMA, "num_hidden_layers": 10**9}, {**TAMM, "num_layers_per_track": 2**30, "num_tracks": 2**20},
         {**TAMM, "num_experts": 10**9, "feed_forward_layer_pattern": ["sparse"]}]
    ):  # fmt: skip
        (tmp_path / str(index)).mkdir()
        (tmp_path / str(index) / "config.json").write_text(json.dumps(config))
        refused("convert", "--model-dir", tmp_path / str(index), "--output-dir", tmp_path / "o", match="num_")
    config = json.loads((made / "engine/config.json").read_text())
    config["pretrained_config"]["mapping"]["world_size"] = 10**9
    folder = link(made / "engine", tmp_path / "engine", **{"config.json": json.dumps(config).encode()})
    refused("inspect", folder, match="expected at most")


def test_a_tokenizer_at_which_the_library_panics(made: Path, tmp_path: Path) -> None:
    data = json.loads((EXAMPLE / "tokenizer.json").read_text())
    data["model"]["continuing_subword_prefix"] = "a prefix that is longer than every token of the vocabulary"
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    options = ("--engine-dir", made / "engine", "--tokenizer-dir", tmp_path, "--model-repository", tmp_path / "r")
    refused("deploy", *options, match="not a tokenizer")
