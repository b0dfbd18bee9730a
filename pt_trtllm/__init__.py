"""From a Parallel Track transformer checkpoint to a served endpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "RequestOutput", "RuntimeOptions", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from pt_trtllm.runtime.llm import LLM, RequestOutput
    from pt_trtllm.runtime.options import RuntimeOptions
    from pt_trtllm.runtime.sampling import SamplingParams

_HOMES = {"LLM": "llm", "RequestOutput": "llm", "RuntimeOptions": "options", "SamplingParams": "sampling"}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are used: `import pt_trtllm` alone stays instant."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"pt_trtllm.runtime.{_HOMES[name]}"), name)
