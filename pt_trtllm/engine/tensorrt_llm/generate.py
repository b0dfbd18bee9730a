"""Runs an engine in TensorRT-LLM's C++ runtime: one process of `mpirun` per rank.

mpirun -n 8 python -m pt_trtllm.engine.tensorrt_llm.generate --engine-dir E --input-ids '[[1, 2, 3]]'
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pt_trtllm.engine.tensorrt_llm.registration import register


def generate(
    engine_dir: Path, prompts: Sequence[Sequence[int]], max_new_tokens: int, end_id: int, rank: int
) -> list[list[int]]:
    """Greedy continuations on rank 0; every other rank works and returns an empty list.

    Attention windows come from the engine's own runtime defaults.
    """
    register()  # the runner reads the engine's config in Python, too
    import torch
    from tensorrt_llm.runtime import ModelRunnerCpp

    runner = ModelRunnerCpp.from_dir(str(engine_dir), rank=rank)
    inputs = [torch.tensor(prompt, dtype=torch.int32) for prompt in prompts]
    answer: Any = runner.generate(
        inputs, max_new_tokens=max_new_tokens, end_id=end_id, pad_id=end_id, return_dict=True,
        output_sequence_lengths=True,
    )  # fmt: skip
    if rank != 0:
        return []
    lengths = answer["sequence_lengths"][:, 0].tolist()
    return [
        answer["output_ids"][index, 0, len(prompt) : length].tolist()
        for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine-dir", type=Path, required=True)
    parser.add_argument("--input-ids", type=json.loads, required=True, help="JSON: a list of prompts of token ids")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--end-id", type=int, default=-1, help="token that ends an answer; -1 means none does")
    options = parser.parse_args()
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.Get_rank()
    outputs = generate(options.engine_dir, options.input_ids, options.max_new_tokens, options.end_id, rank)
    if outputs:
        print(json.dumps({"outputs": [{"output_ids": output} for output in outputs]}))


if __name__ == "__main__":
    main()
