"""One module per source format; each says which folders it recognises and opens them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from pt_trtllm.checkpoint.artifact import MANIFEST, read_json
from pt_trtllm.checkpoint.sources import llama, pt, tamm
from pt_trtllm.checkpoint.sources.base import Source
from pt_trtllm.errors import CheckpointError, ConfigError

KIND = "source checkpoint"
"""What the manifest of an exported folder says: the one folder with a manifest that is a source again."""
SOURCES: dict[str, ModuleType] = {"tamm": tamm, "pt": pt, "llama": llama}


def open_source(folder: Path, source: str = "auto") -> Source:
    """Opens and checks a checkpoint folder; `auto` goes by what its config.json says."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected a checkpoint with config.json and weights")
    if source == "auto":
        source = source_format(folder)
    if source not in SOURCES:
        raise ConfigError(f"source is {source!r}, expected auto or one of {list(SOURCES)}")
    opened = SOURCES[source].open_source(folder)
    assert isinstance(opened, Source)
    return opened


def source_format(folder: Path) -> str:
    """Which of the formats a folder has, by its config.json."""
    config = read_json(folder / "config.json", "a checkpoint of one of the formats " + ", ".join(SOURCES))
    if (folder / MANIFEST).is_file():
        kind = read_json(folder / MANIFEST, "a manifest").get("kind")
        if kind != KIND:
            raise CheckpointError(f"{folder} holds what pt-trtllm has written ({kind}); expected a source checkpoint")
    matches = [name for name, module in SOURCES.items() if module.recognises(config)]
    if not matches:
        raise ConfigError(
            f"{folder / 'config.json'}: model_type {config.get('model_type')!r} is none of the known formats "
            f"({', '.join(SOURCES)}); say which with --source"
        )
    return matches[0]
