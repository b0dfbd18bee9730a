"""Puts the recorder where `import tensorrt_llm` looks, for as long as a context lasts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType

from pt_trtllm.testing.trtllm_recorder import functional, layers, models, module, network

EXPORTS: dict[str, dict[str, object]] = {
    "tensorrt_llm": {"__version__": "1.2.1"},
    "tensorrt_llm._common": {"default_net": network.default_net},
    "tensorrt_llm._utils": {"pad_vocab_size": models.pad_vocab_size},
    "tensorrt_llm.functional": {
        name: getattr(functional, name)
        for name in (
            "AllReduceParams", "AllReduceStrategy", "AttentionMaskType", "PositionEmbeddingType", "allreduce", "cast",
            "concat", "constant", "embedding", "rms_norm", "shape", "split", "tanh", "unsqueeze",
        )
    },
    "tensorrt_llm.layers": {
        name: getattr(layers, name)
        for name in (
            "MOE", "Attention", "ColumnLinear", "Embedding", "GatedMLP", "MoeConfig", "RmsNorm", "RowLinear",
        )
    },
    "tensorrt_llm.mapping": {"Mapping": layers.Mapping},
    "tensorrt_llm.module": {"Module": module.Module},
    "tensorrt_llm.parameter": {"Parameter": module.Parameter},
    "tensorrt_llm.models": {"MODEL_MAP": models.MODEL_MAP},
    "tensorrt_llm.models.modeling_utils": {
        name: getattr(models, name) for name in ("DecoderLayerList", "DecoderModelForCausalLM", "PretrainedConfig")
    },
    "tensorrt_llm.builder": {"BuildConfig": models.BuildConfig, "build": models.build},
    "tensorrt_llm.runtime": {"ModelRunnerCpp": models.ModelRunnerCpp},
}  # fmt: skip
OURS = "pt_trtllm.engine.tensorrt_llm"
"""Its modules hold classes of whichever TensorRT-LLM they were imported with."""


@contextmanager
def recorded_tensorrt_llm() -> Iterator[None]:
    saved = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_affected(name)}
    for name, exports in EXPORTS.items():
        stand_in = ModuleType(name)
        stand_in.__spec__ = ModuleSpec(name, None, is_package=True)
        stand_in.__path__ = []
        vars(stand_in).update(exports)
        sys.modules[name] = stand_in
        if "." in name:
            parent, _, child = name.rpartition(".")
            setattr(sys.modules[parent], child, stand_in)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if _is_affected(name)]:
            del sys.modules[name]
        sys.modules.update(saved)
        models.MODEL_MAP.clear()


def _is_affected(name: str) -> bool:
    return name.split(".")[0] == "tensorrt_llm" or name == OURS or name.startswith(f"{OURS}.")
