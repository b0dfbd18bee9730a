"""Makes TensorRT-LLM know `PTForCausalLM`: in every Python process that reads a checkpoint's or an engine's config."""

from __future__ import annotations

from pt_trtllm.checkpoint.rank_files import ARCHITECTURE
from pt_trtllm.engine.tensorrt_llm.contract import check_contract
from pt_trtllm.engine.tensorrt_llm.support import require_tensorrt_llm


def register() -> None:
    """Idempotent; raises where TensorRT-LLM is missing, or not the API this was written for."""
    require_tensorrt_llm()
    check_contract()
    from tensorrt_llm.models import MODEL_MAP

    from pt_trtllm.engine.tensorrt_llm.model import PTForCausalLM

    MODEL_MAP[ARCHITECTURE] = PTForCausalLM
