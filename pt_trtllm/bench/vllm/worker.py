"""`python -m pt_trtllm.bench.vllm.worker`, run by the interpreter that has vLLM: one engine, driven by lines of JSON.

The first line on stdin says what to load, every other what to ask; each is answered by a line on what was stdout.
Everything that vLLM prints goes to stderr. The engine's scheduler runs in this process, its ranks as vLLM starts them;
or, with an `address`, this process is one of several ranks, each of which gets the same lines.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    order = json.loads(sys.stdin.readline())
    begin = time.perf_counter()
    engine = make_engine(order)
    about = {"load_s": time.perf_counter() - begin, "versions": versions()}
    answer(answers, about)
    for number, line in enumerate(sys.stdin):
        asked = json.loads(line)
        if asked.get("count"):
            engine.collective_rpc("bench_count_begin")
        replies = ask(engine, str(number), asked["requests"])
        if asked.get("count"):
            replies["operations"] = engine.collective_rpc("bench_count_end")
        answer(answers, replies)
    engine.engine_core.shutdown()


def answer(file: Any, data: dict[str, Any]) -> None:
    file.write(json.dumps(data) + "\n")
    file.flush()


def versions() -> dict[str, str]:
    import platform

    import torch
    import vllm

    return {"vllm": vllm.__version__, "torch": str(torch.__version__), "python": platform.python_version()}


def make_engine(order: dict[str, Any]) -> Any:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    arguments = dict(order["arguments"])
    if order.get("address"):
        from pt_trtllm.bench.vllm.ranks import over_tcp

        arguments["distributed_executor_backend"] = over_tcp(order["address"], order["rank"])
    return LLMEngine.from_engine_args(EngineArgs(**arguments))


def ask(engine: Any, key: str, requests: list[list[Any]]) -> dict[str, Any]:
    """[token ids of the prompt, tokens to generate] of each; when they were sent, and when each token was there."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    arrivals: list[list[float]] = [[] for _ in requests]
    sent = time.perf_counter()
    for index, (prompt, tokens) in enumerate(requests):
        sampling = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        engine.add_request(f"{key}-{index}", {"prompt_token_ids": prompt}, sampling)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            index = int(output.request_id.partition("-")[2])
            arrivals[index] += [now] * len(output.outputs[0].token_ids)
    return {"sent": sent, "arrivals": arrivals}


if __name__ == "__main__":
    main()
