"""Models that together use every option of the `pt` layout, in sizes that vLLM's attention on a CPU knows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.checkpoint.sources.base import part_shape
from pt_trtllm.checkpoint.sources.pt import config_json, spelling
from pt_trtllm.config import ModelConfig, RopeScaling
from pt_trtllm.engine.build import BuildOptions, build
from pt_trtllm.engine.bundle import BuildLimits
from pt_trtllm.runtime.request import Request
from pt_trtllm.runtime.sampling import SamplingParams
from pt_trtllm.testing.cases import BASE, DENSE
from pt_trtllm.testing.jobs import Job
from pt_trtllm.testing.pt_layout import write_pt_layout
from pt_trtllm.testing.ranks import run_jobs
from pt_trtllm.testing.reference import build_model, greedy, save_checkpoint

NUM_NEW_TOKENS = 8
PROMPT_LENGTHS = (5, 75, 1, 30)
"""Longer than every window, so that what has left one shows."""
HEADS_OF_32 = {"attention_hidden_dim": 128, "num_heads": 4}

TAMM_CASES: dict[str, dict[str, Any]] = {
    "mixed_dense_sparse": {},
    "sum_of_tracks": {"tracks_combine_op": "sum", "num_layers_per_track_per_sync_point": 1, **DENSE},
    "dispatch_and_combine_norms": {
        "tracks_dispatch_norm": "rms_norm", "tracks_combine_norm": "rms_norm", "tracks_combine_op": "sum",
    },
    "pre_scale_norms": {
        "pre_norm": "pre_scale_rms_norm", "tracks_combine_norm": "pre_scale_rms_norm", "scale_qk_norm": False,
    },
    "pre_residual_and_post_norms": {
        "pre_residual_norm": "rms_norm", "post_norm": "pre_scale_rms_norm", "feed_forward_layer_pattern": ["sparse"],
        "num_experts_per_token": 3, "experts_router_logits_cap": None,
    },
    "post_norm_only": {
        "pre_norm": None, "post_norm": "rms_norm", "num_layers_per_track_per_sync_point": 4, **DENSE,
    },
    "one_track": {"num_tracks": 1, "num_kv_heads": None, "experts_router_logits_cap": 0.5},
    "two_tracks": {"num_tracks": 2, "num_kv_heads": 1, "pre_residual_norm": "rms_norm"},
    "window_of_the_current_token_only": {"local_attention_window_size": 0, "rope_theta": 100.0, **DENSE},
    "all_layers_with_a_window": {
        "local_attention_window_size": 20, "attention_layer_pattern": ["local_rope"], "num_tracks": 2, **DENSE,
    },
}  # fmt: skip
"""What differs from the base of the other tests, in the reference's own words."""

SMALL: dict[str, Any] = {
    "vocab_size": 97, "num_hidden_layers": 4, "sync_interval": 2, "hidden_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96, "max_position_embeddings": 1024,
}  # fmt: skip
BIASED: dict[str, Any] = {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True}

PT_CASES: dict[str, ModelConfig] = {
    "biases_half_rope_llama3": ModelConfig(
        **SMALL, **BIASED, num_tracks=2, qk_norm="unscaled", qk_norm_position="before_rope", rope_style="half",
        attention_pattern=("local_rope", "global_nope"), attention_window=16,
        rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=64),
    ),
    "linear_scaling_tied": ModelConfig(
        **SMALL, num_tracks=4, combine_op="sum", rope_style="interleaved", tie_word_embeddings=True,
        rope_scaling=RopeScaling(kind="linear", factor=4.0),
    ),
    "yarn_sparse_norm_before_rope": ModelConfig(
        **SMALL, num_tracks=4, qk_norm="scaled", qk_norm_position="before_rope", rope_style="half",
        feed_forward_pattern=("dense", "sparse"), moe_intermediate_size=32, num_experts=6, num_experts_per_tok=2,
        router_logits_cap=2.0, rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=32),
    ),
}  # fmt: skip
"""What the reference cannot say."""


@dataclass(frozen=True)
class VllmCase:
    folder: Path
    """In the `pt` layout."""
    prompts: list[list[int]]
    tamm: list[list[int]] | None
    """The reference's greedy continuations, of a model that it can say."""
    cpu: list[list[int]]
    """Those of this project's engine."""


def write_random_pt(config: ModelConfig, folder: Path, seed: int = 0) -> None:
    """A random model in float32, with weights large enough that every part of it shows."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for spec, _, parts in spelling(config):
        for part in parts:
            noise = torch.randn(part_shape(spec, part), generator=generator)
            is_norm = "norm" in part.source_name
            tensors[part.source_name] = 1 + 0.3 * noise if is_norm else 0.15 * noise
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_json(config, "float32")))


def random_prompts(vocab_size: int, seed: int, lengths: tuple[int, ...] = PROMPT_LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


def make_cases(folder: Path, seeds: dict[str, int] | None = None) -> dict[str, VllmCase]:
    """Every case, answered by what it is compared with. `seeds`: other prompts, where a margin is tiny."""
    prompts, tamm = {}, {}
    for name, options in TAMM_CASES.items():
        config = {**BASE, **HEADS_OF_32, **options}
        model = build_model(config)
        save_checkpoint(model, config, folder / name / "tamm")
        write_pt_layout(folder / name / "tamm", folder / name / "pt")
        prompts[name] = random_prompts(config["vocab_size"], (seeds or {}).get(name, 1))
        with torch.no_grad():
            tamm[name] = [greedy(model, prompt, NUM_NEW_TOKENS) for prompt in prompts[name]]
    for name, described in PT_CASES.items():
        write_random_pt(described, folder / name / "pt")
        prompts[name] = random_prompts(described.vocab_size, (seeds or {}).get(name, 1))
    cpu = _answers_of_our_engine(folder, prompts)
    return {name: VllmCase(folder / name / "pt", prompts[name], tamm.get(name), cpu[name]) for name in prompts}


def _answers_of_our_engine(folder: Path, prompts: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    params = SamplingParams(max_tokens=NUM_NEW_TOKENS)
    for name, asked in prompts.items():
        base = folder / name
        convert(base / "pt", base / "checkpoint", ConvertOptions(source="pt", dtype="float32"))
        build(base / "checkpoint", base / "engine", BuildOptions(limits=BuildLimits(max_seq_len=128)))
        Job(requests=tuple(Request(prompt_ids=tuple(ids), params=params) for ids in asked)).write(base)
    run_jobs(1, [(folder / name / "engine", folder / name) for name in prompts])
    return {name: [output["output_ids"] for output in Job.read_results(folder / name)["outputs"]] for name in prompts}
