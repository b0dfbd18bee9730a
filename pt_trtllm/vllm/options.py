"""The plugin's own options: `--additional-config '{"parallel_track": {...}}'` of vLLM."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pt_trtllm.config import reject_unknown_keys, shown
from pt_trtllm.errors import ConfigError

KEY = "parallel_track"


@dataclass(frozen=True, kw_only=True)
class PluginOptions:
    batch_tracks: bool = False
    """Several tracks of a rank compute a projection as one batched product, where nothing is quantised or adapted."""

    def __post_init__(self) -> None:
        if not isinstance(self.batch_tracks, bool):
            raise ConfigError(f"{KEY}: batch_tracks is {shown(self.batch_tracks)}, expected true or false")

    @classmethod
    def read(cls, additional_config: Any) -> PluginOptions:
        """From vLLM's `additional_config`, which other plugins may use as well."""
        given = additional_config.get(KEY, {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(given, Mapping):
            raise ConfigError(f"additional config: {KEY} is {shown(given)}, expected an object")
        reject_unknown_keys(f"additional config: {KEY}", given, {field.name for field in dataclasses.fields(cls)})
        return cls(**given)
