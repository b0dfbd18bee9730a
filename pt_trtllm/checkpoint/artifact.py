"""Folders that exist whole or not at all, with a manifest of digests that readers check."""

from __future__ import annotations

import contextlib
import fcntl
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
WRITERS = {"checkpoint": "convert", "engine": "build", "model repository": "deploy", "source checkpoint": "export"}
"""Kinds of folders, and the command that writes each."""
MAX_JSON_BYTES = 100_000_000
"""The index of a very large model has some megabytes."""
HASH_BLOCK = 1 << 22


@contextlib.contextmanager
def new_folder(target: Path, *, source: Path, force: bool = False) -> Iterator[Path]:
    """Yields a hidden sibling of `target` to fill; renames it into place when the block ends without an error.

    An existing non-empty target is refused without `force`. With it, it is replaced only if this project wrote it, and
    only once the new one is complete. A target that is or contains `source`, what is being read, is always refused.
    """
    try:
        target = _checked_target(target, source, force)
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(target)
    except OSError as error:
        raise CheckpointError(f"cannot write to {target}: {error.strerror}") from None
    work = target.with_name(f".{target.name}.tmp")
    try:
        _clear_leftovers(target, force)
        work.mkdir()
        yield work
        _sync_folder(work)
        _replace(work, target)
    except OSError as error:
        raise CheckpointError(f"writing {target} failed: {error.strerror or error}; nothing was left behind") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        _lock_path(target).unlink(missing_ok=True)
        os.close(lock)


def _checked_target(target: Path, source: Path, force: bool) -> Path:
    """The real path of the target: links are followed, so that what they point to is what is written."""
    if not target.name:
        raise CheckpointError(f"{str(target)!r} has no name of its own; give a new folder to write into")
    real, source = Path(os.path.realpath(target)), Path(os.path.realpath(source))
    if real == source or real in source.parents:
        raise CheckpointError(f"{target} is or contains {source}, which is being read; choose another folder")
    if real.exists() and not real.is_dir():
        raise CheckpointError(f"{target} is a file; expected a folder to write into, or a new name")
    if real.is_dir() and any(real.iterdir()):
        if not force:
            raise CheckpointError(
                f"{target} exists and is not empty; choose another folder, or replace it with --force"
            )
        if not (real / MANIFEST).is_file():
            raise CheckpointError(
                f"{target} was not written by pt-trtllm (it has no {MANIFEST}), so --force will not replace it; "
                "choose another folder, or remove it yourself"
            )
    return real


def _lock_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


def _lock(target: Path) -> int:
    """Takes the right to write `target`; refused while another process has it. Works between containers, too."""
    while True:
        descriptor = os.open(_lock_path(target), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(_lock_path(target)).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise CheckpointError(f"{target}: another process is writing it; wait for it, or choose another") from None
        except FileNotFoundError:
            pass  # its last owner removed it between the two calls: try again
        os.close(descriptor)


def _clear_leftovers(target: Path, force: bool) -> None:
    """With the lock held, hidden siblings are what a killed process left: what it moved aside goes back."""
    old = target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():
        old.rename(target)
        _checked_target(target, old, force)
    for path in (old, target.with_name(f".{target.name}.tmp")):
        shutil.rmtree(path, ignore_errors=True)


def _replace(work: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        target.rename(old)
    work.rename(target)
    _sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


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
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: has {size} bytes, expected {what}, of at most {MAX_JSON_BYTES}")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: no {path.name}; expected {what}") from None
    except RecursionError:
        raise CheckpointError(f"{path}: cannot be read as JSON: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(data).__name__}, expected an object")
    return data


def is_file(path: Path) -> bool:
    """Also of names that no file can have: there is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


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
    expected = f"the {kind} that `pt-trtllm {WRITERS[kind]}` writes"
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected {expected}")
    manifest = read_json(folder / MANIFEST, expected)
    if manifest.get("kind") != kind:
        raise CheckpointError(f"{folder}: its manifest says {manifest.get('kind')!r}; expected {expected}")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder}: format version {manifest.get('format_version')}, this pt-trtllm reads {FORMAT_VERSION}; "
            "convert and build again with this version"
        )
    problems = []
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(e, dict) and {"bytes", "sha256"} <= set(e) for e in files.values()
    ):
        raise CheckpointError(
            f"{folder / MANIFEST}: does not list the files with sizes and digests; make the {kind} again"
        )
    for name, entry in files.items():
        path = folder / name
        if not is_file(path):
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
    """Yields a hidden sibling to write; it takes the target's place when the block ends without an error.

    Links are followed. What is not a regular file (a device, a pipe) is written to directly.
    """
    real = Path(os.path.realpath(target))
    direct = real.exists() and not real.is_file()
    work = real if direct else real.with_name(f".{real.name}.tmp-{os.getpid()}")
    try:
        yield work
        if not direct:
            work.replace(real)
    except OSError as error:
        raise CheckpointError(f"writing {target} failed: {error.strerror or error}") from error
    finally:
        if not direct:
            with contextlib.suppress(OSError):
                work.unlink(missing_ok=True)


def check_writable(target: Path) -> None:
    """Raises when a file cannot be written later, before hours of work are spent on its content."""
    folder = target.absolute().parent
    if not folder.is_dir():
        raise CheckpointError(f"{target}: the folder {folder} does not exist")
    place = target if target.exists() else folder
    if target.is_dir() or not os.access(place, os.W_OK):
        raise CheckpointError(f"{target}: cannot be written; choose another place")
