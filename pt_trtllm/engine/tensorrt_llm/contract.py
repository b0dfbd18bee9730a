"""Every name of TensorRT-LLM that this backend uses, what it passes, and where that was read. Checked before a build.

The sources are files of the public repository of the 1.x line; 1.2.1 is the release this was written for, and it was
not run here. A name or parameter that is missing in the installed version is refused, never worked around.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

from pt_trtllm.errors import EngineError


@dataclass(frozen=True)
class Contract:
    module: str
    name: str
    """Dotted for a method."""
    source: str
    parameters: tuple[str, ...] = ()
    """Passed by name, or by position in this order."""
    members: tuple[str, ...] = ()
    """Attributes or enum members used."""

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


_LINEAR = ("in_features", "out_features", "bias", "dtype", "tp_group", "tp_size")
_FUNCTIONAL, _LAYERS = "tensorrt_llm.functional", "tensorrt_llm.layers"
_IN_FUNCTIONAL = "tensorrt_llm/functional.py"

CONTRACT = (
    Contract("tensorrt_llm._common", "default_net", "tensorrt_llm/_common.py"),
    Contract("tensorrt_llm._utils", "pad_vocab_size", "tensorrt_llm/_utils.py", ("vocab_size", "tp_size")),
    Contract(
        _FUNCTIONAL, "AllReduceParams", _IN_FUNCTIONAL, ("strategy",)
    ),
    Contract(_FUNCTIONAL, "AllReduceStrategy", _IN_FUNCTIONAL, members=("NCCL", "AUTO")),
    Contract(_FUNCTIONAL, "AttentionMaskType", _IN_FUNCTIONAL, members=("causal",)),
    Contract(
        _FUNCTIONAL,
        "PositionEmbeddingType",
        _IN_FUNCTIONAL,
        members=("learned_absolute", "rope_gptj", "rope_gpt_neox"),
    ),
    Contract(_FUNCTIONAL, "allreduce", _IN_FUNCTIONAL, ("tensor", "group", "all_reduce_params")),
    Contract(_FUNCTIONAL, "cast", _IN_FUNCTIONAL, ("input", "dtype")),
    Contract(_FUNCTIONAL, "concat", _IN_FUNCTIONAL, ("inputs", "dim")),
    Contract(_FUNCTIONAL, "constant", _IN_FUNCTIONAL, ("ndarray",)),
    Contract(_FUNCTIONAL, "embedding", _IN_FUNCTIONAL, ("input", "weight")),
    Contract(
        _FUNCTIONAL, "rms_norm", _IN_FUNCTIONAL, ("input", "normalized_shape", "num_groups", "weight", "eps")
    ),
    Contract(_FUNCTIONAL, "shape", _IN_FUNCTIONAL, ("input", "dim")),
    Contract(_FUNCTIONAL, "split", _IN_FUNCTIONAL, ("tensor", "split_size_or_sections", "dim")),
    Contract(_FUNCTIONAL, "tanh", _IN_FUNCTIONAL, ("input",)),
    Contract(_FUNCTIONAL, "unsqueeze", _IN_FUNCTIONAL, ("input", "axis")),
    Contract(
        _LAYERS,
        "Attention",
        "tensorrt_llm/layers/attention.py",
        (
            "local_layer_idx", "hidden_size", "num_attention_heads", "num_kv_heads", "max_position_embeddings",
            "num_layers", "attention_head_size", "qk_layernorm", "attention_mask_type", "bias", "dense_bias", "dtype",
            "position_embedding_type", "rotary_embedding_base", "tp_group", "tp_size", "tp_rank", "quant_mode",
        ),
    ),
    Contract(_LAYERS, "ColumnLinear", "tensorrt_llm/layers/linear.py", (*_LINEAR, "gather_output")),
    Contract(
        _LAYERS, "Embedding", "tensorrt_llm/layers/embedding.py", ("num_embeddings", "embedding_dim", "dtype")
    ),
    Contract(
        _LAYERS,
        "GatedMLP",
        "tensorrt_llm/layers/mlp.py",
        ("hidden_size", "ffn_hidden_size", "hidden_act", "bias", "dtype", "tp_group", "tp_size", "quant_mode"),
    ),
    Contract(
        _LAYERS,
        "MOE",
        "tensorrt_llm/layers/moe.py",
        (
            "moe_config", "hidden_size", "ffn_hidden_size", "hidden_act", "mapping", "bias", "dtype", "tp_group",
            "tp_size", "quant_mode", "use_all_reduce",
        ),
    ),
    Contract(
        _LAYERS,
        "MoeConfig",
        "tensorrt_llm/layers/moe.py",
        ("num_experts", "top_k", "normalization_mode"),
        ("ExpertScaleNormalizationMode",),
    ),
    Contract(_LAYERS, "RmsNorm", "tensorrt_llm/layers/normalization.py", ("normalized_shape", "eps", "dtype")),
    Contract(_LAYERS, "RowLinear", "tensorrt_llm/layers/linear.py", (*_LINEAR, "strict_dtype")),
    Contract(
        "tensorrt_llm.mapping", "Mapping", "tensorrt_llm/mapping.py", ("world_size", "rank", "tp_size", "pp_size")
    ),
    Contract("tensorrt_llm.models", "MODEL_MAP", "tensorrt_llm/models/__init__.py"),
    Contract(
        "tensorrt_llm.models.modeling_utils",
        "PretrainedConfig",
        "tensorrt_llm/models/modeling_utils.py",
        members=("from_checkpoint", "set_rank", "to_dict"),
    ),
    Contract(
        "tensorrt_llm.models.modeling_utils",
        "DecoderLayerList",
        "tensorrt_llm/models/modeling_utils.py",
        ("cls", "config"),
        ("forward",),
    ),
    Contract(
        "tensorrt_llm.models.modeling_utils",
        "DecoderModelForCausalLM",
        "tensorrt_llm/models/modeling_utils.py",
        ("config", "transformer", "lm_head"),
        ("from_checkpoint",),
    ),
    Contract(
        "tensorrt_llm.models.modeling_utils",
        "DecoderLayerList.forward",
        "tensorrt_llm/models/modeling_utils.py",
        ("hidden_states", "use_cache", "attention_mask", "kv_cache_params", "attention_params", "position_ids"),
    ),
    Contract(
        "tensorrt_llm.models.modeling_utils",
        "DecoderModelForCausalLM.from_checkpoint",
        "tensorrt_llm/models/modeling_utils.py",
        ("ckpt_dir", "rank", "config", "preprocess_weights_hook"),
    ),
    Contract(
        _LAYERS,
        "Attention.forward",
        "tensorrt_llm/layers/attention.py",
        ("hidden_states", "attention_mask", "use_cache", "kv_cache_params", "attention_params", "all_reduce_params"),
    ),
    Contract(
        _LAYERS, "GatedMLP.forward", "tensorrt_llm/layers/mlp.py",
        ("hidden_states", "lora_layer_params", "all_reduce_params"),
    ),
    Contract(
        _LAYERS, "MOE.forward", "tensorrt_llm/layers/moe.py",
        ("hidden_states", "lora_layer_params", "all_reduce_params"),
    ),
    Contract(
        _LAYERS, "RowLinear.forward", "tensorrt_llm/layers/linear.py",
        ("x", "lora_runtime_params", "all_reduce_params"),
    ),
    Contract(_LAYERS, "RmsNorm.forward", "tensorrt_llm/layers/normalization.py", ("x", "normalized_shape")),
    Contract("tensorrt_llm.module", "Module", "tensorrt_llm/module.py", members=("register_parameter",)),
    Contract("tensorrt_llm.parameter", "Parameter", "tensorrt_llm/parameter.py", ("shape", "dtype")),
    Contract(
        "tensorrt_llm.builder",
        "BuildConfig",
        "tensorrt_llm/builder.py",
        ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens", "gather_context_logits"),
    ),
    Contract("tensorrt_llm.builder", "build", "tensorrt_llm/builder.py", ("model", "build_config")),
    Contract("tensorrt_llm.runtime", "ModelRunnerCpp", "tensorrt_llm/runtime/model_runner_cpp.py"),
    Contract(
        "tensorrt_llm.runtime", "ModelRunnerCpp.from_dir", "tensorrt_llm/runtime/model_runner_cpp.py",
        ("engine_dir", "rank"),
    ),
    Contract(
        "tensorrt_llm.runtime",
        "ModelRunnerCpp.generate",
        "tensorrt_llm/runtime/model_runner_cpp.py",
        ("batch_input_ids", "max_new_tokens", "end_id", "pad_id", "return_dict", "output_sequence_lengths"),
    ),
)  # fmt: skip


def check_contract() -> None:
    """Raises one error that lists everything the installed TensorRT-LLM lacks."""
    problems = [problem for contract in CONTRACT for problem in contract_problems(contract)]
    if problems:
        import tensorrt_llm

        raise EngineError(
            f"backend tensorrt-llm was written for 1.2.1; tensorrt_llm {tensorrt_llm.__version__} lacks "
            f"{'; '.join(problems)}; install 1.2.1, or use --backend tensorrt"
        )


def find(contract: Contract) -> Any:
    """The object in the installed version; raises ImportError or AttributeError where there is none."""
    found: Any = importlib.import_module(contract.module)
    for part in contract.name.split("."):
        found = getattr(found, part)
    return found


def contract_problems(contract: Contract) -> list[str]:
    try:
        found = find(contract)
    except (ImportError, AttributeError):
        return [contract.path]
    problems = [f"{contract.path}.{member}" for member in contract.members if not hasattr(found, member)]
    if contract.parameters:
        accepted = inspect.signature(found).parameters
        takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values())
        problems += [
            f"{contract.path}({name}=)" for name in contract.parameters if name not in accepted and not takes_any
        ]
    return problems
