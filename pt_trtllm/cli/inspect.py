"""`pt-trtllm inspect`"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from pt_trtllm.checkpoint.artifact import MANIFEST, read_json, read_manifest, verify_file
from pt_trtllm.checkpoint.rank_files import CheckpointConfig, open_checkpoint
from pt_trtllm.checkpoint.safetensors_io import DTYPE_NAMES, read_header
from pt_trtllm.checkpoint.sources import KIND as SOURCE
from pt_trtllm.checkpoint.sources import open_source, source_format
from pt_trtllm.config import ModelConfig
from pt_trtllm.engine.bundle import open_bundle
from pt_trtllm.errors import CheckpointError
from pt_trtllm.mapping import Mapping, SyncPoint, sync_counts, sync_plan
from pt_trtllm.serving.repository import KIND as REPOSITORY


@click.command("inspect")
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--verify", is_flag=True, help="Read every file and compare its digest with the manifest.")
@click.option("--tensors", is_flag=True, help="List the tensors of every rank.")
def command(path: Path, as_json: bool, verify: bool, tensors: bool) -> None:
    """Show what a checkpoint, an engine or a model repository holds, its mapping and sync plan."""
    folder = path if path.is_dir() else path.parent
    info = _written_here(folder, verify) if (folder / MANIFEST).is_file() else _source(folder)
    if tensors:
        info["tensors"] = {file.name: _tensors(file) for file in sorted(_tensor_files(folder, info))}
    if as_json:
        click.echo(json.dumps(info, indent=2))
    else:
        _print(info)


def _written_here(folder: Path, verify: bool) -> dict[str, Any]:
    manifest = read_json(folder / MANIFEST, "a manifest")
    if manifest.get("kind") == SOURCE:
        return _exported(folder, manifest, verify)
    if manifest.get("kind") != REPOSITORY:
        return _converted(folder, verify)
    engine_dir, tokenizer_dir = manifest.get("engine_dir"), manifest.get("tokenizer_dir")
    if not (isinstance(engine_dir, str) and isinstance(tokenizer_dir, str)):
        raise CheckpointError(f"{folder / MANIFEST}: lacks engine_dir or tokenizer_dir; deploy again")
    return {
        "path": str(folder),
        "kind": REPOSITORY,
        "models": sorted(path.parent.name for path in folder.glob("*/config.pbtxt")),
        "tokenizer_dir": tokenizer_dir,
        "engine": _converted(Path(engine_dir), verify),
    }


def _converted(folder: Path, verify: bool) -> dict[str, Any]:
    kind = read_json(folder / MANIFEST, "a manifest").get("kind")
    details: dict[str, Any] = {}
    if kind == "engine":
        engine, manifest = open_bundle(folder)
        checkpoint: CheckpointConfig = engine.checkpoint
        details = {"backend": engine.backend, "limits": engine.to_json()["build_config"]}
        if engine.backend_config:
            details["backend_config"] = _backend_config(engine.backend_config)
            details["ranks"] = manifest.get("ranks", [])
    elif kind == "checkpoint":
        checkpoint, manifest = open_checkpoint(folder)
    else:
        raise CheckpointError(f"{folder}: manifest of kind {kind!r}, expected a checkpoint or an engine")
    if verify:
        for name in manifest["files"]:
            verify_file(folder, name, manifest)
    return {
        "path": str(folder),
        "kind": kind,
        "written_by": f"pt-trtllm {manifest.get('pt_trtllm_version')}",
        "dtype": checkpoint.dtype,
        "quantization": checkpoint.quantization.method,
        **details,
        "verified": verify,
        "files": {name: entry["bytes"] for name, entry in manifest["files"].items()},
        "model": checkpoint.model.to_dict(),
        "mapping": _mapping(checkpoint.mapping),
        "sync_plan": _plan(checkpoint.model, checkpoint.mapping),
    }


def _backend_config(config: dict[str, Any]) -> dict[str, Any]:
    """The tensors of an engine by name: type, and the range of every axis in each profile."""
    tensors = {
        tensor["name"]: f"{tensor['mode']} {tensor['dtype']}"
        + "".join(f", {profile} {_ranges(tensor[profile])}" for profile in config.get("profiles", []))
        + (f", in place of {tensor['aliases']}" if "aliases" in tensor else "")
        for tensor in config.get("tensors", [])
    }
    return {**config, "tensors": tensors}


def _ranges(axes: list[list[int]]) -> str:
    return f"[{', '.join(str(low) if low == high else f'{low}..{high}' for low, _, high in axes)}]"


def _exported(folder: Path, manifest: dict[str, Any], verify: bool) -> dict[str, Any]:
    """A source that `export` wrote. Its files may have been added to since, so only `verify` asks what they were."""
    if verify:
        manifest = read_manifest(folder, SOURCE)
        for name in manifest["files"]:
            verify_file(folder, name, manifest)
    info = _source(folder)
    written_by = f"pt-trtllm {manifest.get('pt_trtllm_version')}"
    return {"path": info["path"], "kind": SOURCE, "written_by": written_by, "verified": verify, **info}


def _source(folder: Path) -> dict[str, Any]:
    name = source_format(folder)
    source = open_source(folder, name)
    sizes = Mapping.possible_world_sizes(source.config.num_tracks)
    return {
        "path": str(folder),
        "kind": SOURCE,
        "format": name,
        "dtype": str(source.dtype).removeprefix("torch."),
        "model": source.config.to_dict(),
        "sync_points_by_world_size": {
            str(size): sync_counts(
                sync_plan(source.config, Mapping(world_size=size, num_tracks=source.config.num_tracks))
            )
            for size in sizes
        },
    }


def _mapping(mapping: Mapping) -> dict[str, Any]:
    return {
        "world_size": mapping.world_size,
        "num_tracks": mapping.num_tracks,
        "tracks_per_rank": mapping.tracks_per_rank,
        "tp_size": mapping.tp_size,
        "tracks_of_rank": [list(mapping.for_rank(rank).local_tracks) for rank in range(mapping.world_size)],
    }


def _plan(model: ModelConfig, mapping: Mapping) -> dict[str, Any]:
    plan = sync_plan(model, mapping)
    return {"per_forward": sync_counts(plan), "order": [_describe(point) for point in plan]}


def _describe(point: SyncPoint) -> str:
    where = "output" if point.layer_idx is None else f"layer {point.layer_idx} {point.place}"
    return f"{point.kind} over {point.group_size} ranks: {where}"


def _tensor_files(folder: Path, info: dict[str, Any]) -> Sequence[Path]:
    """Serialized engines cannot be opened without their GPU: what is known of their tensors is shown anyway."""
    if "backend_config" in info:
        return []
    return [*folder.glob("rank*.safetensors"), *folder.glob("rank*.engine"), *folder.glob("model*.safetensors")]


def _tensors(path: Path) -> dict[str, str]:
    return {name: f"{DTYPE_NAMES[info.dtype]} {list(info.shape)}" for name, info in read_header(path)[0].items()}


def _print(info: dict[str, Any], indent: int = 0) -> None:
    for key, value in info.items():
        if isinstance(value, dict) and value:
            click.echo(f"{' ' * indent}{key}:")
            _print(value, indent + 2)
        elif key == "order":
            click.echo(f"{' ' * indent}order:")
            for line in value:
                click.echo(f"{' ' * (indent + 2)}{line}")
        else:
            click.echo(f"{' ' * indent}{key}: {json.dumps(value)}")
