"""Run by the Python that has vLLM, once per rank: makes one engine after the other, asks each all its requests in one
batch, and writes what they answered as JSON. Ranks are started as vLLM's external launchers do it."""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "enforce_eager": True,
    "disable_log_stats": True,
    "skip_tokenizer_init": True,
    "kv_cache_memory_bytes": 1 << 26,
}


def main() -> None:
    jobs: list[dict[str, Any]] = json.loads(Path(sys.argv[1]).read_text())
    answers = []
    for job in jobs:
        start_ranks(job["port"])
        try:
            answers.append({"answers": ask(job)})
        except Exception as error:
            traceback.print_exc()
            answers.append({"error": f"{type(error).__name__}: {error}"})
        end_ranks(job["port"])
    if os.environ["RANK"] == "0":
        Path(sys.argv[2]).write_text(json.dumps(answers))


def start_ranks(port: int) -> None:
    """Engines after one another meet at different ports, and have shared memory of different names."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    os.environ["MASTER_PORT"] = str(port)
    numbers = itertools.count()
    _CPUSHMDistributed.make_group_name = staticmethod(lambda communicator: f"pt-{port}-{next(numbers)}")


def end_ranks(port: int) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()
    for left in Path("/dev/shm").glob(f"pt-{port}-*"):
        left.unlink(missing_ok=True)


def ask(job: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    ranks = int(os.environ["WORLD_SIZE"])
    backend = {"distributed_executor_backend": "external_launcher", "tensor_parallel_size": ranks} if ranks > 1 else {}
    llm = LLM(**{**OPTIONS, **backend, **job["options"]})
    adapters = sorted({request["adapter"] for request in job["requests"] if request.get("adapter")})
    for _ in range(job["times"]):
        outputs = llm.generate(
            [{"prompt_token_ids": request["prompt"]} for request in job["requests"]],
            [
                SamplingParams(
                    temperature=0,
                    max_tokens=request["max_tokens"],
                    prompt_logprobs=request.get("prompt_logprobs"),
                    ignore_eos=True,
                    detokenize=False,
                )
                for request in job["requests"]
            ],
            lora_request=[
                LoRARequest(path, adapters.index(path) + 1, path) if path else None
                for path in (request.get("adapter") for request in job["requests"])
            ],
        )
    return [
        {
            "ids": list(output.outputs[0].token_ids),
            "cached": output.num_cached_tokens or 0,
            "prompt_logprobs": [
                rows[token].logprob
                for rows, token in zip((output.prompt_logprobs or [])[1:], output.prompt_token_ids[1:], strict=False)
            ],
        }
        for output in outputs
    ]


if __name__ == "__main__":
    main()
