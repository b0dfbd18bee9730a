"""`PTConfig`: what TensorRT-LLM reads of a checkpoint's config.json, with the whole PT model under `pt`."""

from __future__ import annotations

from typing import Any

from tensorrt_llm.models.modeling_utils import PretrainedConfig

from pt_trtllm.checkpoint.rank_files import CheckpointConfig
from pt_trtllm.engine.tensorrt_llm.support import check_supported
from pt_trtllm.mapping import Mapping


class PTConfig(PretrainedConfig):  # type: ignore[misc]
    """Counts outside `pt` are global, as its C++ runtime divides them by the number of ranks.

    Everything set here must be plain JSON: the config is written into the engine as it is.
    """

    def __init__(self, *, pt: dict[str, Any], rope_positions: int | None = None, **fields: Any) -> None:
        super().__init__(**fields)
        self.pt = pt
        self.rope_positions = rope_positions or self.max_position_embeddings
        """Rows of the rotary tables; the build driver sets the longest sequence."""
        check_supported(self.checkpoint)
        if self.use_parallel_embedding:
            raise ValueError("PTConfig: use_parallel_embedding would add a collective per step; leave it false")

    @property
    def checkpoint(self) -> CheckpointConfig:
        fields = {"pt": self.pt, "mapping": {"world_size": self.mapping.world_size}, "dtype": self.dtype}
        return CheckpointConfig.from_json(fields, "PTConfig")

    @property
    def place(self) -> Mapping:
        """This rank's place among tracks and ranks."""
        return self.checkpoint.mapping.for_rank(self.mapping.rank)
