"""How far reduced precision moves the example model: KL divergence to float32, per token, over 2 MPI ranks.

    python scripts/bench_numerics.py [--model-dir examples/tiny-pt] [--world-size 2] [--json FILE]

The text is the model's own: sampled from its float32 engine with fixed seeds, so every run sees the same tokens.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from pt_trtllm import LLM, RuntimeOptions, SamplingParams
from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.checkpoint.quantize import Quantization
from pt_trtllm.engine.build import BuildOptions, build
from pt_trtllm.testing.numeric import mean_kl_divergence

VARIANTS = {
    "float32": ("float32", Quantization()),
    "bfloat16": ("bfloat16", Quantization()),
    "float16": ("float16", Quantization()),
    "float32, int8 KV cache": ("float32", Quantization()),
    "bfloat16, int8 KV cache": ("bfloat16", Quantization()),
    "int8_wo, float32": ("float32", Quantization(method="int8_wo")),
    "int8_wo, bfloat16": ("bfloat16", Quantization(method="int8_wo")),
    "int4_wo group 32, float32": ("float32", Quantization(method="int4_wo", group_size=32)),
    "int4_wo group 32, bfloat16": ("bfloat16", Quantization(method="int4_wo", group_size=32)),
}
NUM_TEXTS, TEXT_TOKENS = 16, 128


def measure(model_dir: Path, world_size: int, base: Path) -> dict[str, dict[str, float]]:
    """variant -> mean KL to float32 (nats per token) and share of tokens whose most likely successor is the same."""
    texts: list[tuple[int, ...]] = []
    reference: torch.Tensor | None = None
    results = {}
    for name, (dtype, quantization) in VARIANTS.items():
        folder = base / name.replace(" ", "-").replace(",", "")
        options = ConvertOptions(world_size=world_size, dtype=dtype, quantization=quantization)
        config = convert(model_dir, folder / "checkpoint", options)
        build(folder / "checkpoint", folder / "engine", BuildOptions())
        runtime = RuntimeOptions(kv_cache_dtype="int8" if "int8 KV" in name else "auto")
        with LLM(folder / "engine", options=runtime) as llm:
            if not texts:
                bos = (config.model.bos_token_id or 0,)
                params = [
                    SamplingParams(max_tokens=TEXT_TOKENS, temperature=1.0, seed=seed, ignore_eos=True)
                    for seed in range(NUM_TEXTS)
                ]
                sampled = llm.generate([bos] * NUM_TEXTS, params)
                texts = [bos + result.outputs[0].token_ids for result in sampled]
            results_here = llm.generate(texts, SamplingParams(max_tokens=1), prompt_logits=True)
        logits = torch.cat([result.prompt_logits for result in results_here if result.prompt_logits is not None])
        reference = logits if reference is None else reference
        same = (logits.argmax(-1) == reference.argmax(-1)).float().mean().item()
        results[name] = {"kl_nats_per_token": mean_kl_divergence(logits, reference), "same_top_token": same}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", type=Path, default=Path(__file__).parent.parent / "examples/tiny-pt")
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pt-bench-") as folder:
        results = measure(args.model_dir, args.world_size, Path(folder))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    print(f"{'variant':28} {'KL, nats per token':>20} {'same top token':>15}")
    for name, row in results.items():
        print(f"{name:28} {row['kl_nats_per_token']:20.3g} {row['same_top_token']:15.1%}")


if __name__ == "__main__":
    main()
