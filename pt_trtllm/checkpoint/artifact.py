"""Folders that exist whole or not at all, with a manifest of digests that readers check."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pt_trtllm import __version__
from pt_trtllm.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
HASH_BLOCK = 1 << 22


@contextlib.contextmanager
def new_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yields a hidden sibling of `target` to fill; renames it into place when the block ends without an error.

    An existing non-empty target is refused without `force`, and with it replaced only once the new one is complete.
    """
    target = Path(os.path.abspath(target))
    _remove_abandoned(target)
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; expected a folder to write into, or a new name")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise CheckpointError(f"{target} exists and is not empty; choose another folder, or replace it with --force")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = target.with_name(f".{target.name}.tmp-{os.getpid()}")
        work.mkdir()
    except OSError as error:
        raise CheckpointError(f"cannot write to {target.parent}: {error.strerror}") from None
    try:
        yield work
        _sync_folder(work)
        _replace(work, target)
    except OSError as error:
        raise CheckpointError(f"writing {target} failed: {error.strerror or error}; nothing was left behind") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _replace(work: Path, target: Path) -> None:
    old = None
    if target.exists():
        old = target.with_name(f".{target.name}.old-{os.getpid()}")
        target.rename(old)
    work.rename(target)
    _sync_folder(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _remove_abandoned(target: Path) -> None:
    """Clears what a killed process left, and puts back what it had moved aside; folders of living ones stay."""
    for path in target.parent.glob(f".{target.name}.*-*"):
        state, _, pid = path.name.removeprefix(f".{target.name}.").partition("-")
        if not pid.isdigit() or Path(f"/proc/{pid}").exists():
            continue
        if state == "old" and not target.exists():
            path.rename(target)
        elif state in ("old", "tmp"):
            shutil.rmtree(path, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, data: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file, or one clear line about why not."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: no {path.name}; expected {what}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(data).__name__}, expected an object")
    return data


def file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path, kind: str, details: dict[str, Any], *, digests: dict[str, str] | None = None) -> None:
    """Records every file of the folder. `digests` spares reading again what the writer has hashed itself."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            name = str(path.relative_to(folder))
            files[name] = {"bytes": path.stat().st_size, "sha256": (digests or {}).get(name) or file_digest(path)}
    data = {"kind": kind, "format_version": FORMAT_VERSION, "pt_trtllm_version": __version__, **details, "files": files}
    write_json(folder / MANIFEST, data)


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """Checks kind, version and file sizes; contents are checked by `verify_file` where they are read whole."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected a {kind} written by pt-trtllm")
    manifest = read_json(folder / MANIFEST, f"a {kind} written by pt-trtllm")
    if manifest.get("kind") != kind:
        raise CheckpointError(f"{folder}: holds a {manifest.get('kind')!r}, expected a {kind!r}")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder}: format version {manifest.get('format_version')}, this pt-trtllm reads {FORMAT_VERSION}; "
            "convert and build again with this version"
        )
    problems = []
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes, expected {entry['bytes']}")
    if problems:
        raise CheckpointError(f"{folder}: " + "; ".join(problems) + "; copy or make it again")
    return manifest


def verify_file(folder: Path, name: str, manifest: dict[str, Any]) -> None:
    expected = manifest["files"].get(name, {}).get("sha256")
    found = file_digest(folder / name)
    if found != expected:
        raise CheckpointError(f"{folder / name}: sha256 is {found}, the manifest says {expected}; the file was changed")


@contextlib.contextmanager
def replace_file(target: Path) -> Iterator[Path]:
    """Yields a hidden sibling to write; it takes the target's place when the block ends without an error."""
    work = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        yield work
        work.replace(target)
    except OSError as error:
        raise CheckpointError(f"writing {target} failed: {error.strerror or error}") from error
    finally:
        work.unlink(missing_ok=True)
