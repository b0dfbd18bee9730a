"""The two engines that the tests compare: a real vLLM in a process of its own, and ours."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pt_trtllm import LLM
from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.engine.build import BuildOptions, build
from pt_trtllm.runtime.sampling import SamplingParams

ASK = Path(__file__).with_name("ask.py")
LONGEST_S = 800.0


ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    ids: list[int]
    prompt_logprobs: list[float]
    """Of every token of the prompt but the first."""
    cached: int = 0


@dataclass(frozen=True)
class Job:
    """An engine and what it is asked, all in one batch; `times` asks again, and the last answers count."""

    model: Path
    requests: Sequence[dict[str, Any]]
    options: dict[str, Any]
    times: int = 1


def vllm_answers(jobs: Sequence[Job], ranks: int, work: Path) -> list[list[Answer] | str]:
    """Per job the answers, or why there are none. A process of a rank makes all engines: it imports vLLM once."""
    written = [
        {
            "options": {"model": str(job.model), **job.options},
            "requests": list(job.requests),
            "times": job.times,
            "port": port,
        }
        for job, port in zip(jobs, free_ports(len(jobs)), strict=True)
    ]
    work.mkdir(exist_ok=True)
    (work / "jobs.json").write_text(json.dumps(written))
    processes = []
    for rank in range(ranks):
        places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        with (work / f"rank{rank}.log").open("wb") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(ASK), str(work / "jobs.json"), str(work / "out.json")],
                    stdout=log, stderr=log, cwd=work, env={**os.environ, **ENVIRONMENT, **places},
                )
            )  # fmt: skip
    try:
        ends = time.monotonic() + LONGEST_S
        while any(process.poll() is None for process in processes) and time.monotonic() < ends:
            if any(process.poll() for process in processes):
                break  # its peers would wait for it
            time.sleep(0.2)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = "\n".join((work / f"rank{rank}.log").read_text()[-4000:] for rank in range(ranks))
    assert (work / "out.json").exists(), logs
    found = json.loads((work / "out.json").read_text())
    return [entry.get("error") or [Answer(**answer) for answer in entry["answers"]] for entry in found]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def our_answers(model: Path, prompts: Sequence[Sequence[int]], max_tokens: int, work: Path) -> list[Answer]:
    """The CPU engine in float32, on one rank."""
    convert(model, work / "checkpoint", ConvertOptions(dtype="float32"))
    build(work / "checkpoint", work / "engine", BuildOptions())
    with LLM(work / "engine") as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=max_tokens, ignore_eos=True), prompt_logits=True)
    answers = []
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.prompt_logits is not None
        table = torch.log_softmax(output.prompt_logits.float(), dim=-1)
        logprobs = table[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])].tolist()
        answers.append(Answer(list(output.outputs[0].token_ids), logprobs))
    return answers
