"""Damaged and hostile checkpoints: one clear line each, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.checkpoint.quantize import Quantization
from pt_trtllm.engine.build import BuildOptions, build
from pt_trtllm.errors import PtError

pytestmark = pytest.mark.unit
MakeSource = Callable[..., Path]
QKV = "layers.segment_0.layer_0.attention.qkv_transform.fused_linear.weight"


def refused(source: Path, target: Path, match: str, **options: Any) -> None:
    """Converting fails with one line, and leaves neither the target nor a temporary sibling."""
    before = set(target.parent.iterdir())
    with pytest.raises(PtError, match=match) as caught:
        convert(source, target, ConvertOptions(**options))
    assert "\n" not in str(caught.value)
    assert set(target.parent.iterdir()) == before


def edit(source: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")


def edit_config(source: Path, **values: object) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **values}))


def test_a_truncated_file_is_refused(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source()
    with (source / "model.safetensors").open("r+b") as file:
        file.truncate(200_000)
    refused(source, tmp_path / "out", r"model.safetensors: cut short: .* needs bytes up to \d+, the file has 200000")


def test_a_file_cut_within_its_header_is_refused(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source()
    with (source / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    refused(source, tmp_path / "out", "not a safetensors file, or cut short: 100 bytes")


def test_an_empty_file_is_refused(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source()
    (source / "model.safetensors").write_bytes(b"")
    refused(source, tmp_path / "out", "not a safetensors file, or cut short: 0 bytes")


def test_all_missing_tensors_are_named(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source()
    edit(source, lambda tensors: (tensors.pop(QKV), tensors.pop("output_norm.weight")))
    refused(source, tmp_path / "out", r"qkv_transform.fused_linear.weight is missing; output_norm.weight is missing")


def test_unexpected_tensors_are_named(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source()
    edit(source, lambda tensors: tensors.update({"adapter.weight": torch.zeros(3)}))
    refused(source, tmp_path / "out", r"adapter.weight is unexpected")


def test_wrong_shapes_are_named_with_both_shapes(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source()
    edit(source, lambda tensors: tensors.update({QKV: torch.zeros(4, 64, 100)}))
    refused(source, tmp_path / "out", r"has shape \[4, 64, 100\], expected \[4, 64, 128\]")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_that_are_not_floating_point_or_quantised_are_refused(
    make_source: MakeSource, tmp_path: Path, dtype: torch.dtype
) -> None:
    source = make_source()
    edit(source, lambda tensors: tensors.update({QKV: torch.zeros(4, 64, 128, dtype=dtype)}))
    refused(source, tmp_path / "out", rf"has type {dtype}, expected floating point of 16 bits or more: give the unq")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_with_their_place(
    make_source: MakeSource, tmp_path: Path, value: float
) -> None:
    source = make_source()
    edit(source, lambda tensors: tensors["embedding.weight"].__setitem__((7, 5), value))
    refused(source, tmp_path / "out", rf"embedding.weight holds {value} \(index \[7, 5\]\)")


def test_values_beyond_float16_are_refused(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source()
    edit(source, lambda tensors: tensors["embedding.weight"].__setitem__((0, 0), 1e6))
    refused(source, tmp_path / "out", "beyond float16's 65504; choose --dtype bfloat16", dtype="float16")


class Payload:
    """What a malicious pickle looks like: unpickling would run this."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_with_code_is_refused_and_not_run(make_source: MakeSource, tmp_path: Path) -> None:
    source, marker = make_source(), tmp_path / "ran"
    torch.save({"embedding.weight": Payload(marker)}, source / "model.pt")
    (source / "model.safetensors").unlink()
    refused(source, tmp_path / "out", "model.pt: not a plain state dict of tensors")
    assert not marker.exists()


def test_a_pickle_of_something_else_is_refused(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source()
    torch.save({"steps": 3}, source / "model.pt")
    (source / "model.safetensors").unlink()
    refused(source, tmp_path / "out", r"model.pt: holds \['steps'\], expected only named tensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"colour": "red"}, r"unknown keys \['colour'\]"),
        ({"num_heads": 3}, "num_heads 3 does not divide attention_hidden_dim 64"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"tracks_combine_op": "max"}, "combine_op is 'max'"),
        ({"num_layers_per_track_per_sync_point": 3}, "sync_interval 3 does not divide"),
        ({"attention_layer_pattern": "local_rope"}, "expected lists"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"post_norm": "layer_norm"}, "post_norm is 'layer_norm'"),
    ],
)
def test_bad_configurations_are_refused(
    make_source: MakeSource, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    source = make_source()
    edit_config(source, **options)
    refused(source, tmp_path / "out", message, world_size=2)


def test_an_impossible_mapping_is_refused(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source(num_tracks=5)
    refused(source, tmp_path / "out", r"5 tracks cannot be spread over 2 ranks.*possible here: 1, 5, 10", world_size=2)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"'])
def test_a_config_that_is_no_json_object_is_refused(make_source: MakeSource, tmp_path: Path, text: str) -> None:
    source = make_source()
    (source / "config.json").write_text(text)
    refused(source, tmp_path / "out", r"config.json: (cannot be read as JSON|holds a JSON)")


def test_a_folder_without_weights_is_refused(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source()
    (source / "model.safetensors").unlink()
    refused(source, tmp_path / "out", "no weights found; expected one of model.safetensors")


def test_groups_that_straddle_a_cut_are_refused(make_source: MakeSource, tmp_path: Path) -> None:
    options = {"quantization": Quantization(method="int4_wo", group_size=128)}
    refused(make_source(), tmp_path / "out", r"has 64 inputs per rank, not a multiple of the group size 128", **options)


def test_an_existing_folder_is_kept_without_force(make_source: MakeSource, tmp_path: Path) -> None:
    source, target = make_source(), tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("mine")
    refused(source, target, "exists and is not empty; choose another folder, or replace it with --force")
    refused(source, target, "was not written by pt-trtllm .*so --force will not replace it", force=True)
    assert (target / "precious").read_text() == "mine"
    convert(source, target.with_name("new"), ConvertOptions())
    first = (target.with_name("new") / "manifest.json").stat().st_ino
    convert(source, target.with_name("new"), ConvertOptions(force=True))
    assert (target.with_name("new") / "manifest.json").stat().st_ino != first


def test_what_is_being_read_is_never_replaced(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source("place/source")
    for target in (source, source.parent, source / ".."):
        refused(source, target, "is or contains .*which is being read", force=True)
    (tmp_path / "link").symlink_to(source)
    refused(source, tmp_path / "link", "which is being read", force=True)
    refused(source, Path(""), "has no name of its own", force=True)
    convert(source, tmp_path / "checkpoint", ConvertOptions())
    with pytest.raises(PtError, match="which is being read"):
        build(tmp_path / "checkpoint", tmp_path / "checkpoint", BuildOptions(force=True))


def test_a_linked_output_folder_is_written_where_it_points(make_source: MakeSource, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    convert(make_source(), tmp_path / "link", ConvertOptions())
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/manifest.json").is_file()


def test_two_processes_do_not_write_one_folder(make_source: MakeSource, tmp_path: Path) -> None:
    source, target = make_source(), tmp_path / "place" / "out"
    target.parent.mkdir()
    with halfway(source, target) as process:
        with pytest.raises(PtError, match="another process is writing it"):
            convert(source, target, ConvertOptions())
        process.communicate("\n", timeout=240)
    assert process.returncode == 0
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_a_failed_conversion_with_force_keeps_the_old_folder(make_source: MakeSource, tmp_path: Path) -> None:
    source, target = make_source(), tmp_path / "out"
    convert(source, target, ConvertOptions())
    before = (target / "rank0.safetensors").read_bytes()
    edit(source, lambda tensors: tensors["output_norm.weight"].__setitem__(0, float("nan")))
    refused(source, target, "output_norm.weight holds nan", force=True)
    assert (target / "rank0.safetensors").read_bytes() == before


LIMITED = """
import resource, sys
from pathlib import Path
from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.errors import PtError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    convert(Path(sys.argv[1]), Path(sys.argv[2]), ConvertOptions())
except PtError as error:
    print(error)
"""


def test_a_disk_that_takes_no_more_leaves_nothing_behind(make_source: MakeSource, tmp_path: Path) -> None:
    source, target = make_source(), tmp_path / "place" / "out"
    command = [sys.executable, "-c", LIMITED, str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    assert "out failed: File too large; nothing was left behind" in done.stdout
    assert list(target.parent.iterdir()) == []


STEPWISE = """
import sys
from pathlib import Path
from pt_trtllm.checkpoint.convert import ConvertOptions, convert
def halt(done, total):
    if done == total // 2:
        print(flush=True)
        sys.stdin.readline()
convert(Path(sys.argv[1]), Path(sys.argv[2]), ConvertOptions(force=True), halt)
"""
"""Says when half of the tensors are written, and waits for a line before it goes on."""


@contextmanager
def halfway(source: Path, target: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of a conversion."""
    command = [sys.executable, "-c", STEPWISE, str(source), str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "\n"
            yield process
        finally:
            process.kill()


def test_a_kill_in_the_middle_keeps_the_old_folder_and_the_next_run_cleans_up(
    make_source: MakeSource, tmp_path: Path
) -> None:
    source, target = make_source(), tmp_path / "place" / "out"
    convert(source, target, ConvertOptions())
    before = (target / "rank0.safetensors").read_bytes()
    with halfway(source, target) as process:
        process.send_signal(signal.SIGKILL)
    assert (target / "rank0.safetensors").read_bytes() == before
    assert {path.name for path in target.parent.iterdir()} == {"out", ".out.tmp", ".out.lock"}
    convert(source, target, ConvertOptions(force=True))
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_a_folder_moved_aside_by_a_killed_process_comes_back(make_source: MakeSource, tmp_path: Path) -> None:
    """Between the two renames of a replacement there is an instant without the folder."""
    source, target = make_source(), tmp_path / "place" / "out"
    convert(source, target, ConvertOptions())
    target.rename(target.with_name(".out.old"))
    with pytest.raises(PtError, match="exists and is not empty"):
        convert(source, target, ConvertOptions())
    assert (target / "rank0.safetensors").is_file()


def test_changed_bytes_in_a_converted_checkpoint_are_noticed(make_source: MakeSource, tmp_path: Path) -> None:
    convert(make_source(), tmp_path / "checkpoint", ConvertOptions())
    path = tmp_path / "checkpoint/rank0.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(PtError, match=r"the manifest says .*; the file was changed"):
        build(tmp_path / "checkpoint", tmp_path / "engine", BuildOptions())
    assert not (tmp_path / "engine").exists()


def test_a_missing_rank_file_is_noticed(make_source: MakeSource, tmp_path: Path) -> None:
    convert(make_source(), tmp_path / "checkpoint", ConvertOptions(world_size=2))
    (tmp_path / "checkpoint/rank1.safetensors").unlink()
    with pytest.raises(PtError, match=r"rank1.safetensors is missing; copy or make it again"):
        build(tmp_path / "checkpoint", tmp_path / "engine", BuildOptions())


def test_a_checkpoint_of_another_format_version_is_refused(make_source: MakeSource, tmp_path: Path) -> None:
    convert(make_source(), tmp_path / "checkpoint", ConvertOptions())
    path = tmp_path / "checkpoint/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    with pytest.raises(PtError, match="format version 99, this pt-trtllm reads 1; convert and build again"):
        build(tmp_path / "checkpoint", tmp_path / "engine", BuildOptions())
