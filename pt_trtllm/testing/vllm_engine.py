"""Real vLLM in tests: many small engines, and one import of vLLM.

Importing vLLM takes 10 s of a core, making an engine of a small model one or two. So one process imports it and forks
the ranks of each job. Ranks are started the way vLLM's external launchers do it: each has a scheduler of its own, all
decide alike, and only the workers' collectives run between them. The command line's way (`vllm serve`) has a test of
its own.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

NUM_NEW_TOKENS = 8
LONGEST_S = 850.0
"""Of one batch of jobs; only ends a hang."""
SHOWN_OF_A_LOG = 6000

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 1 << 26,  # said, so that vLLM need not warm up to find out
    "skip_tokenizer_init": True,
    "disable_log_stats": True,
}
"""What every engine gets, where its job does not say otherwise."""

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
}


CACHE_IN_GIB = "VLLM_CPU_KVCACHE_SPACE"
"""Would overrule the option, and a whole GiB takes each rank a second to clear."""


@dataclass(frozen=True, kw_only=True)
class VllmJob:
    """An engine, and what it is asked."""

    model: str
    """A folder."""
    prompts: list[list[int]]
    num_new_tokens: int = NUM_NEW_TOKENS
    ranks: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of vLLM's `LLM`."""
    lora: str = ""
    """A folder with an adapter that answers these prompts."""
    counted: bool = False
    """Whether collectives are counted."""
    with_margins: bool = False
    """Costs 10 s: vLLM compiles a function that ranks log-probabilities."""
    before: str = ""
    """Python that every rank runs before it makes its engine: how a test plants an error."""


@dataclass(frozen=True, kw_only=True)
class VllmAnswer:
    error: str = ""
    """Why there is no engine or no answer; the log's end follows it."""
    tokens: list[list[int]] = field(default_factory=list)
    """Per prompt, the greedy next tokens."""
    margins: list[list[float]] = field(default_factory=list)
    """How far the best token is ahead of the second, in log-probability, where asked."""
    passes: int = 0
    """Forward passes that were counted."""
    collectives: dict[str, int] = field(default_factory=dict)
    """All collectives of rank 0 in these passes: "<group> <kind>" -> how many."""
    products: int = 0
    """Matrix products in these passes."""


class VllmEngines:
    """Answers jobs. Use it in a `with` block: its processes end there."""

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="pt-vllm-"))
        self._log = self._folder / "server.log"
        self._num_batches = 0
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pt_trtllm.testing.vllm_engine"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                env=_without(CACHE_IN_GIB) | ENVIRONMENT | (environment or {}),
            )

    def __enter__(self) -> VllmEngines:
        return self

    def __exit__(self, *exc: object) -> None:
        # Whatever the ranks have started is in the group, too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
        for left in Path("/dev/shm").glob(f"{self._folder.name}-*"):  # vLLM leaves them even where it ends by itself
            left.unlink(missing_ok=True)

    def answer(self, job: VllmJob) -> VllmAnswer:
        """The tokens; an engine that fails is a failed assertion."""
        return self.answers([job])[0]

    def answers(self, jobs: Sequence[VllmJob]) -> list[VllmAnswer]:
        found = self.run(jobs)
        for job, answer in zip(jobs, found, strict=True):
            assert not answer.error, f"vLLM with {job.model} on {job.ranks} ranks: {answer.error}"
        return found

    def run(self, jobs: Sequence[VllmJob]) -> list[VllmAnswer]:
        """As many at once as there are cores for their ranks."""
        batch = self._folder / f"batch{self._num_batches}"
        self._num_batches += 1
        batch.mkdir()
        (batch / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        watchdog = _killed_after(self._process.pid, LONGEST_S)
        try:
            self._process.stdin.write(f"{batch}\n")
            self._process.stdin.flush()
            said = self._process.stdout.readline()
        except BrokenPipeError:
            said = ""
        finally:
            watchdog.cancel()
        assert said == "done\n", f"vLLM's process ended or hung:\n{_end_of(self._log)}{_logs(batch)}"
        return [_collect(batch / str(index), job.ranks) for index, job in enumerate(jobs)]


def _without(variable: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != variable}


def _killed_after(pid: int, seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, os.killpg, (pid, signal.SIGKILL))
    timer.daemon = True
    timer.start()
    return timer


def _collect(folder: Path, ranks: int) -> VllmAnswer:
    answers = []
    for rank in range(ranks):
        path = folder / f"{rank}.json"
        found = json.loads(path.read_text()) if path.exists() else {"error": "a rank ended before it had an answer"}
        answers.append(VllmAnswer(**found))
    # A rank that fails lets the others wait: the one that says why is the cause.
    failed = [answer for answer in answers if answer.error]
    if failed:
        cause = max(failed, key=lambda answer: len(answer.error))
        return VllmAnswer(error=f"{cause.error}\n{_logs(folder)}")
    if any(answer.tokens != answers[0].tokens for answer in answers):
        return VllmAnswer(error=f"the ranks disagree: {[answer.tokens for answer in answers]}")
    return answers[0]


def _logs(folder: Path) -> str:
    return "".join(f"--- {path.name} of {path.parent.name}\n{_end_of(path)}" for path in sorted(folder.rglob("*.log")))


def _end_of(path: Path) -> str:
    return path.read_text(errors="replace")[-SHOWN_OF_A_LOG:]


# What follows runs in the process that has imported vLLM.


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints
    import vllm.entrypoints.llm
    import vllm.v1.worker.cpu_worker  # noqa: F401

    for line in sys.stdin:
        _run_batch(Path(line.strip()))
        answers.write("done\n")
        answers.flush()


def _run_batch(batch: Path) -> None:
    jobs = [VllmJob(**job) for job in json.loads((batch / "jobs.json").read_text())]
    waiting, running = collections.deque(enumerate(jobs)), dict[int, int]()
    cores = len(os.sched_getaffinity(0))
    while waiting or running:
        while waiting and (not running or len(running) + waiting[0][1].ranks <= cores):
            index, job = waiting.popleft()
            (batch / str(index)).mkdir()
            running |= {_fork(job, rank, batch / str(index)): index for rank in range(job.ranks)}
        pid, status = os.wait()
        failed = running.pop(pid, None)
        if failed is not None and status:
            for other, index in running.items():
                if index == failed:
                    os.kill(other, signal.SIGKILL)


def _fork(job: VllmJob, rank: int, folder: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, opened in ((0, nothing), (1, log), (2, log)):
        os.dup2(opened, descriptor)
    code = 1
    try:
        _write(folder / f"{rank}.json", _answer(job, rank, folder))
        code = 0
    except BaseException as error:
        traceback.print_exc()
        _write(folder / f"{rank}.json", VllmAnswer(error=f"{type(error).__name__}: {error}"))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _write(path: Path, answer: VllmAnswer) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(asdict(answer)))
    part.rename(path)


def _answer(job: VllmJob, rank: int, folder: Path) -> VllmAnswer:
    exec(job.before, {})
    import torch
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options = {**OPTIONS, **job.options, "model": job.model, "tensor_parallel_size": job.ranks}
    if job.ranks > 1:
        options["distributed_executor_backend"] = _executor(rank, folder)
    llm = LLM(**options)
    sampling = SamplingParams(
        temperature=0,
        max_tokens=job.num_new_tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=2 if job.with_margins else None,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in job.prompts]
    adapter = LoRARequest("adapter", 1, job.lora) if job.lora else None
    passes: list[int] = []
    llm.apply_model(lambda model: model.register_forward_pre_hook(lambda *_: passes.append(1)) and None)
    if job.counted:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            outputs = llm.generate(prompts, sampling, lora_request=adapter, use_tqdm=False)
        collectives, products = _counts(profile)
    else:
        outputs = llm.generate(prompts, sampling, lora_request=adapter, use_tqdm=False)
        collectives, products = {}, 0
    completions = [output.outputs[0] for output in outputs]
    return VllmAnswer(
        tokens=[list(completion.token_ids) for completion in completions],
        margins=[[_margin(step) for step in completion.logprobs or ()] for completion in completions],
        passes=len(passes),
        collectives=collectives,
        products=products,
    )


def _margin(step: dict[int, Any]) -> float:
    best, second = sorted((found.logprob for found in step.values()), reverse=True)[:2]
    return float(best - second)


def _executor(rank: int, folder: Path) -> type:
    """vLLM's executor for ranks that something else has started; its own way to meet them is one port for all."""
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    class RankExecutor(ExecutorWithExternalLauncher):  # type: ignore[misc]
        def _distributed_args(self) -> tuple[str, int, int]:
            # Its last part also names the ranks' shared memory.
            place = folder / f"{folder.parent.parent.name}-{folder.parent.name}-{folder.name}"
            return f"file://{place}", rank, rank

    return RankExecutor


def _counts(profile: Any) -> tuple[dict[str, int], int]:
    """Every collective that reached a kernel, compiled code's too: `<group> <kind>`, the group by vLLM's name."""
    from vllm.distributed import parallel_state

    names = {}
    for name, reference in parallel_state._groups.items():
        shared_memory: Any = getattr(getattr(reference(), "device_communicator", None), "dist_module", None)
        if hasattr(shared_memory, "handle"):
            names[shared_memory.handle] = name
    found = collections.Counter[str]()
    products = 0
    for event in profile.events():
        library, _, operation = event.name.partition("::")
        if library == "_C" and operation.startswith("shm_"):
            found[f"{names.get(event.concrete_inputs[0], '?')} {operation.removeprefix('shm_')}"] += 1
        elif library == "c10d":
            found[f"torch {operation}"] += 1
        elif event.name in ("_C::onednn_mm", "aten::mm", "aten::addmm", "aten::linear", "aten::bmm"):
            products += 1
    return dict(found), products


if __name__ == "__main__":
    main()
