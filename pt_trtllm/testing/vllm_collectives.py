"""A PT checkpoint in vLLM by vLLM's all-reduce and by this project's own collective: the same greedy tokens in float32?

    python -m pt_trtllm.testing.vllm_collectives examples/tiny-pt [--ranks 2] [--eager]

Our own runs twice, each time in new processes: the second finds compiled graphs in the cache of the first. Prints one
line of JSON a run. Exit codes: 0 all the same, 1 not, 77 nothing was run. Called by scripts/gpu_check.sh.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

SKIPPED = 77
LIMIT_S = 900
"""Of one run: only ends a hang."""
NUM_PROMPTS, NUM_NEW_TOKENS = 8, 40


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--eager", action="store_true", help="without vLLM's compiler")
    parser.add_argument("--collective", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.collective is not None:
        print(json.dumps(generate(options.model_dir, options.ranks, options.eager, options.collective)))
        return 0
    reason = cannot_run(options.ranks)
    if reason:
        print(f"vllm_collectives: not run: {reason}")
        return SKIPPED
    with tempfile.TemporaryDirectory() as cache:
        runs = [run(options, collective, cache) for collective in ("vllm", "pt", "pt")]
    return 0 if all(tokens is not None and tokens == runs[0] for tokens in runs) else 1


def cannot_run(ranks: int) -> str | None:
    try:
        import torch
        from vllm.platforms import current_platform
    except ImportError as error:
        return f"vLLM cannot be imported ({error})"
    if current_platform.is_cuda() and torch.cuda.device_count() < ranks:
        return f"{ranks} ranks need as many GPUs, this machine has {torch.cuda.device_count()}"
    return None


def run(options: argparse.Namespace, collective: str, cache: str) -> list[list[int]] | None:
    """Greedy tokens of every prompt, from a process of its own. None and the end of its output when it failed."""
    command = [sys.executable, "-m", "pt_trtllm.testing.vllm_collectives", str(options.model_dir)]
    command += ["--ranks", str(options.ranks), "--collective", collective, *(["--eager"] if options.eager else [])]
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:  # a file: workers that outlive their parent would keep a pipe open
        environment = {**os.environ, "VLLM_CACHE_ROOT": cache}
        done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=LIMIT_S)
        log.seek(0)
        lines = log.read().splitlines()
    tokens = None if done.returncode else next(json.loads(line) for line in reversed(lines) if line.startswith("[["))
    seconds = round(time.monotonic() - start, 1)
    print(json.dumps({"collective": collective, "seconds": seconds, "tokens": tokens}), flush=True)
    if tokens is None:
        print("\n".join(lines[-40:]), flush=True)
    return tokens


def generate(model_dir: Path, ranks: int, eager: bool, collective: str) -> list[list[int]]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(model_dir),
        tensor_parallel_size=ranks,
        dtype="float32",
        enforce_eager=eager,
        max_model_len=256,
        max_num_seqs=NUM_PROMPTS,
        additional_config={"parallel_track": {"collective": collective}},
    )
    prompts = [{"prompt_token_ids": [3 + number * 7 % 97 for number in range(5 + 20 * i)]} for i in range(NUM_PROMPTS)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True))
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    sys.exit(main())
