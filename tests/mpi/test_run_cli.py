"""The command line end to end, over real MPI ranks, the way users and their scripts call it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pt_trtllm.testing.cases import BASE
from pt_trtllm.testing.cli import StartedCli, check_cli, refusal
from pt_trtllm.testing.numeric import FLOAT32_LOGITS, assert_close
from pt_trtllm.testing.processes import wait_until_gone
from pt_trtllm.testing.reference import NUM_NEW_TOKENS, Reference, make_reference

pytestmark = pytest.mark.mpi

LONG_MODEL = {**BASE, "max_position_embeddings": 100_000}
"""With room for answers that last until a test has had its way."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    made = make_reference(BASE, tmp_path_factory.mktemp("reference"))
    (made.folder / "config.json").write_text(json.dumps(LONG_MODEL))
    return made


@pytest.fixture(scope="module")
def engines(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """world size -> engine folder, made with both spellings of the options."""
    folder = tmp_path_factory.mktemp("engines")
    for size in (1, 2, 4):
        checkpoint, engine = folder / f"checkpoint{size}", folder / f"engine{size}"
        check_cli("convert", "--model_dir", reference.folder, "--output-dir", checkpoint, "--world_size", size)
        check_cli("build", "--checkpoint_dir", checkpoint, "--output-dir", engine, "--max_seq_len", 60_000)
    return {size: folder / f"engine{size}" for size in (1, 2, 4)}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_run_gives_the_references_tokens_and_logits(
    reference: Reference, engines: dict[int, Path], tmp_path: Path, world_size: int
) -> None:
    done = check_cli(
        "run", "--engine-dir", engines[world_size], "--input-ids", json.dumps(reference.prompts),
        "--max-new-tokens", NUM_NEW_TOKENS, "--output-json", tmp_path / "out.json",
        "--context-logits", tmp_path / "logits.safetensors",
    )  # fmt: skip
    data = json.loads((tmp_path / "out.json").read_text())
    assert [json.loads(line) for line in done.stdout.splitlines()] == reference.continuations
    for output, prompt, continuation in zip(data["outputs"], reference.prompts, reference.continuations, strict=True):
        assert output == {"input_ids": prompt, "output_ids": continuation, "text": None, "finish_reason": "length"}
    stats = data["stats"]
    assert stats["world_size"] == world_size
    fusions = 2 if world_size > 1 else 0
    assert stats["sync_points_per_forward"] == {
        "track_fusion": fusions, "tensor_parallel": 0, "logits": int(world_size > 1),
    }  # fmt: skip
    assert stats["forward_passes"] == NUM_NEW_TOKENS
    logits = load_file(tmp_path / "logits.safetensors")
    assert set(logits) == {str(index) for index in range(len(reference.prompts))}
    for index, expected in enumerate(reference.logits):
        assert_close(logits[str(index)], expected, FLOAT32_LOGITS, f"prompt {index}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logits.safetensors", "out.json"]


def test_an_answer_that_ends_where_the_engine_does_says_so(engines: dict[int, Path], tmp_path: Path) -> None:
    checkpoint = engines[1].with_name("checkpoint1")
    check_cli("build", "--checkpoint-dir", checkpoint, "--output-dir", tmp_path / "engine", "--max-seq-len", 8)
    run = ("run", "--engine-dir", tmp_path / "engine", "--input-ids", "[[1, 2, 3]]")
    done = check_cli(*run, "--max-new-tokens", 9)
    assert len(json.loads(done.stdout)) == 5
    assert "ended after 5 of 9 tokens, at the engine's max_seq_len of 8; build it with a larger one" in done.stderr
    assert "note:" not in check_cli(*run, "--max-new-tokens", 5).stderr


def test_requests_of_a_file_keep_their_own_options(engines: dict[int, Path], tmp_path: Path) -> None:
    lines = [
        {"input_ids": [3, 4, 5], "max_tokens": 2},
        {"input_ids": [3, 4, 5], "max_tokens": 6, "temperature": 1.5, "seed": 11},
        {"input_ids": [3, 4, 5], "max_tokens": 6, "temperature": 1.5, "seed": 11},
        {"input_ids": [3, 4, 5], "max_tokens": 6, "temperature": 1.5, "seed": 12},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    check_cli(
        "run", "--engine-dir", engines[1], "--input-file", tmp_path / "in.jsonl", "--output-json", tmp_path / "out.json"
    )
    ids = [output["output_ids"] for output in json.loads((tmp_path / "out.json").read_text())["outputs"]]
    assert [len(row) for row in ids] == [2, 6, 6, 6]
    assert ids[1] == ids[2] != ids[3]


class Running:
    """`pt-trtllm run` with an answer that takes minutes, and the process ids of its ranks."""

    def __init__(self, engine: Path, world_size: int, tmp_path: Path, **env: str) -> None:
        self.process = StartedCli(
            "run", "--engine-dir", engine, "--input-ids", "[[1,2,3]]", "--max-new-tokens", 50000, "--ignore-eos",
            env={"TMPDIR": str(tmp_path), **env},
        )  # fmt: skip
        self.tmp_path, self.world_size = tmp_path, world_size
        self.pids: dict[int, int] = {}
        try:
            for rank in range(world_size):
                self.pids[rank] = self._pid(rank)
        except BaseException:
            self.close()
            raise
        time.sleep(1.0)  # into the middle of the answer

    def _pid(self, rank: int) -> int:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            for path in self.tmp_path.glob(f"pt-trtllm-*/rank{rank}.status"):
                log = path.with_name("launcher.log")
                if log.is_file() and _is_generating(path.parent, self.world_size):
                    status: dict[str, Any] = json.loads(path.read_text())
                    return int(status["pid"])
            assert self.process.poll() is None, self.process.wait()
            time.sleep(0.05)
        raise AssertionError("the ranks did not start")

    def outcome(self) -> str:
        """The last line on stderr, once the command has ended."""
        done = self.process.wait()
        assert done.returncode == 1, done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.strip()]
        return line

    def close(self) -> None:
        """A test that failed leaves nothing that slows the next one."""
        if self.process.poll() is None:
            for pid in self.pids.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)  # it may be stopped
        self.process.__exit__()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _is_generating(job_dir: Path, world_size: int) -> bool:
    return all(
        (job_dir / f"rank{rank}.status").is_file() and "loaded" in (job_dir / f"rank{rank}.log").read_text()
        for rank in range(world_size)
    )


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_and_is_named(engines: dict[int, Path], tmp_path: Path, victim: int) -> None:
    with Running(engines[2], 2, tmp_path) as running:
        os.kill(running.pids[victim], signal.SIGKILL)
        line = running.outcome()
    # Beside it the other rank, where the launcher ended that one before it knew.
    assert re.search(rf"rank {victim} \(pid {running.pids[victim]}\).* died without a message", line)
    assert "last lines of its log" in line
    wait_until_gone(list(running.pids.values()))
    assert list(tmp_path.glob("pt-trtllm-*")) == []


def test_a_rank_that_hangs_is_named_after_the_time_limit(engines: dict[int, Path], tmp_path: Path) -> None:
    with Running(engines[2], 2, tmp_path, PT_COMM_TIMEOUT_S="15", PT_LOAD_TIMEOUT_S="120") as running:
        os.kill(running.pids[1], signal.SIGSTOP)
        line = running.outcome()
    assert re.search(r"rank 0 waited \d", line)
    assert f"rank 1 (pid {running.pids[1]}" in line
    wait_until_gone(list(running.pids.values()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupting_the_command_ends_its_ranks(
    engines: dict[int, Path], tmp_path: Path, number: signal.Signals
) -> None:
    with Running(engines[2], 2, tmp_path) as running:
        running.process.send_signal(number)
        assert running.process.wait().returncode == 130
    wait_until_gone(list(running.pids.values()))
    assert list(tmp_path.glob("pt-trtllm-*")) == []


def test_an_engine_file_that_does_not_belong_is_refused_by_its_rank(
    engines: dict[int, Path], reference: Reference, tmp_path: Path
) -> None:
    """The manifest is made to match, so that only the plan inside the file tells."""
    shutil.copytree(engines[2], tmp_path / "e")
    first, second = (tmp_path / f"e/rank{rank}.engine" for rank in range(2))
    shutil.copyfile(first, second)
    manifest = json.loads((tmp_path / "e/manifest.json").read_text())
    manifest["files"]["rank1.engine"] = manifest["files"]["rank0.engine"]
    (tmp_path / "e/manifest.json").write_text(json.dumps(manifest))
    line = refusal("run", "--engine-dir", tmp_path / "e", "--input-ids", "[[1]]")
    assert "rank1.engine: its plan does not belong to this folder's config.json; build the engine again" in line
