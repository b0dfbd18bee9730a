"""What vLLM can be asked for and a PT model cannot do: said by name, before a weight is loaded."""

from __future__ import annotations

import dataclasses
from typing import Any

from pt_trtllm.config import ModelConfig
from pt_trtllm.errors import ConfigError
from pt_trtllm.mapping import Mapping
from pt_trtllm.vllm.options import PluginOptions
from pt_trtllm.vllm.quantised import kv_scales_problem, split_problem

SPECULATION = ("ngram", "ngram_gpu", "suffix", "draft_model")
"""Methods that need nothing of the model but its logits. The others read hidden states after chosen layers; tracks
have a common one only where they meet."""
OVERRIDABLE = frozenset(("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"))
DESCRIBED = {"parallel_track", *(field.name for field in dataclasses.fields(ModelConfig))} - OVERRIDABLE
"""Overrides change only the configuration that vLLM is shown; the model reads its own description."""


def mapping_of(config: ModelConfig, vllm_config: Any, rank: int) -> Mapping:
    """The place of this rank of vLLM's tensor-parallel group. Raises one line with all that cannot be served."""
    problems = asked_for_in_vain(vllm_config)
    mapping = Mapping(
        world_size=vllm_config.parallel_config.tensor_parallel_size, num_tracks=config.num_tracks, rank=rank
    )
    mapping.check_model(config)
    if mapping.tp_size > 1 and vllm_config.lora_config is not None:
        problems.append(
            f"LoRA with {mapping.world_size} ranks for {config.num_tracks} tracks (adapters are not split within a "
            f"track): use --tensor-parallel-size {config.num_tracks} or a divisor of it"
        )
    if vllm_config.lora_config is not None and config.num_experts > 0:
        problems.append("LoRA on a model with experts: leave --enable-lora out, and serve merged weights")
    quantisation = vllm_config.quant_config
    method = None if quantisation is None else quantisation.get_name()
    found = (split_problem(method, mapping.tp_size), kv_scales_problem(quantisation))
    problems += [problem for problem in found if problem is not None]
    if problems:
        raise ConfigError(f"a PT model does not support {'; nor '.join(problems)}")
    return mapping


def asked_for_in_vain(vllm_config: Any) -> list[str]:
    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    found = [
        f"{what} (--{option.replace('_', '-')}): {instead}"
        for option, what, instead in (
            ("pipeline_parallel_size", "pipeline parallelism", "use --tensor-parallel-size; tracks hardly communicate"),
            ("prefill_context_parallel_size", "prefill context parallelism", "leave it out"),
            ("decode_context_parallel_size", "decode context parallelism", "leave it out"),
        )
        if getattr(parallel, option, 1) > 1
    ]
    found += [
        f"{what} (--{option.replace('_', '-')}): experts belong to their track"
        for option, what in (
            ("enable_expert_parallel", "expert parallelism"),
            ("enable_eplb", "load balancing of experts"),
        )
        if getattr(parallel, option, False)
    ]
    if speculative is not None and speculative.method not in SPECULATION:
        found.append(f"speculation by {speculative.method!r}: use one of {', '.join(SPECULATION)}")
    overrides = getattr(getattr(vllm_config, "model_config", None), "hf_overrides", None)
    overridden = sorted(DESCRIBED & overrides.keys()) if isinstance(overrides, dict) else []
    if overridden:
        found.append(f"{', '.join(overridden)} in --hf-overrides: change the folder's config.json")
    if getattr(vllm_config.compilation_config.pass_config, "enable_sp", False):
        found.append("the sequence-parallel compiler pass (enable_sp): leave it out")
    own = PluginOptions.read(vllm_config.additional_config).collective == "pt"
    if own and (getattr(parallel, "enable_dbo", False) or getattr(parallel, "ubatch_size", 0) > 1):
        found.append("collective 'pt' with micro-batches (--enable-dbo, --ubatch-size): it serves one stream")
    return found
