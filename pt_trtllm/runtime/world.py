"""A running engine as its client sees it: started, connected to, asked, ended, and explained when it fails."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from pt_trtllm.checkpoint.artifact import check_writable
from pt_trtllm.engine.bundle import open_bundle
from pt_trtllm.engine.tensorrt_llm.support import runs_elsewhere
from pt_trtllm.errors import CommunicationError, ConfigError, PtError, error_of_kind
from pt_trtllm.runtime.launch import (
    WORKER_MODULE,
    explain_failure,
    launch_command,
    rank_environment,
    stop,
    stopped_ranks,
)
from pt_trtllm.runtime.options import RuntimeOptions
from pt_trtllm.runtime.outbox import Outbox
from pt_trtllm.runtime.protocol import Channel, Message, encode, request_to_json
from pt_trtllm.runtime.request import Request

MAX_SOCKET_PATH = 100
"""The kernel takes 107 bytes."""
SHUTDOWN_S = 20.0
FAILURE_GRACE_S = 5.0
"""For the ranks of a failing world to say why, before they are ended."""
ABORT_GRACE_S = 5.0
"""For the launcher of a world that hangs: it may hang as well, and a restart waits for it."""
LOGGER = logging.getLogger("pt_trtllm.world")
IDS = itertools.count()
"""Of the requests to all worlds of this process: who cancels one that ended with its world must not meet another's in
the world that took its place."""
INSIDE_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


class Events(Protocol):
    """Where a request's events go: a queue, or what passes them on to one. Called from the reader's thread."""

    def put(self, event: Any) -> None: ...


class World:
    """The ranks of one engine, as child processes. Events of a request arrive in the queue given to `submit`.

    Events are ("tokens", [ids], finish_reason or None, extras as in `protocol.py`), or an exception:
    the request was refused, or the world ended. No call waits for ranks that do not read what they are sent.
    """

    def __init__(
        self,
        engine_dir: Path,
        options: RuntimeOptions | None = None,
        hostfile: Path | None = None,
        tokenizer_dir: Path | None = None,
        give_up: Callable[[Path], str] = lambda folder: "",
    ) -> None:
        """Returns when the ranks have joined, which may take long; `give_up` is asked again and again meanwhile, with
        the world's folder, and its answer, unless empty, is raised as the reason to end them."""
        self._check_outside_mpi()
        self.config, _ = open_bundle(engine_dir)
        options = options or RuntimeOptions()
        if options.trace_file:
            check_writable(Path(options.trace_file))
        if self.config.backend == "tensorrt-llm":
            raise runs_elsewhere(engine_dir, self.config.mapping.world_size)
        options.check(self.config)
        if hostfile is not None and self.config.mapping.world_size == 1:
            raise ConfigError("this engine has one rank, which runs here; --hostfile is for engines of several ranks")
        self.folder = Path(tempfile.mkdtemp(prefix="pt-trtllm-"))
        self._lock = threading.Lock()
        self._queues: dict[int, Events] = {}
        self._failure: PtError | None = None
        self._closing = self._has_ended = False
        self._stats: queue.SimpleQueue[Message | PtError] = queue.SimpleQueue()
        self.num_signs_of_life = 0
        """Grows while ranks make steps."""
        try:
            self._start(engine_dir.resolve(), options, hostfile, tokenizer_dir, give_up)
            self._reader = threading.Thread(target=self._read, name="pt-trtllm-world", daemon=True)
            self._reader.start()
        except BaseException:
            self._end()
            raise

    def submit(self, requests: Sequence[tuple[Request, Events]]) -> list[int]:
        """Sends requests, each with the queue for its events, in one message: they start together. Returns ids."""
        ids = [next(IDS) for _ in requests]
        entries = [
            [request_id, request_to_json(request)] for request_id, (request, _) in zip(ids, requests, strict=True)
        ]
        message = encode({"type": "submit", "requests": entries})
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if self._has_ended:
                raise CommunicationError("its ranks have ended")
            self._queues.update({request_id: events for request_id, (_, events) in zip(ids, requests, strict=True)})
        self._outbox.put(message)
        return ids

    def cancel(self, request_id: int) -> None:
        """Ends a request; its last event says "cancelled" unless it had ended already."""
        self._send({"type": "cancel", "id": request_id})

    def stats(self) -> Message:
        """What the engine did since it started."""
        self._send({"type": "stats"})
        answer = self._stats.get()
        if isinstance(answer, PtError):
            self._stats.put(answer)  # for all who ask later, and at the same time
            raise answer
        return answer

    @property
    def failure(self) -> PtError | None:
        """Why the world ended; None while it runs."""
        return self._failure

    def abort(self, reason: str) -> None:
        """Ends a world that hangs. Requests in flight fail with the reason at once."""
        self._fail(CommunicationError(reason))
        stop(self._process, self.folder, grace_s=ABORT_GRACE_S)

    def close(self) -> None:
        """Ends every process of the world; requests still running fail."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._send({"type": "shutdown"})
        if not stopped_ranks(self.folder):  # these do not hear of it
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(SHUTDOWN_S)
        self._end()
        self._reader.join(SHUTDOWN_S)

    def _start(
        self,
        engine_dir: Path,
        options: RuntimeOptions,
        hostfile: Path | None,
        tokenizer_dir: Path | None,
        give_up: Callable[[Path], str],
    ) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            path = self._bind(listener)
            world_size = self.config.mapping.world_size
            self._command = launch_command(world_size, hostfile) if world_size > 1 else []
            self._command += [sys.executable, "-m", WORKER_MODULE, str(engine_dir), str(self.folder), path]
            self._command += [options.to_bytes().decode(), *([str(tokenizer_dir.resolve())] if tokenizer_dir else [])]
            log = (self.folder / "launcher.log").open("w")
            with log:
                self._process = self._launch(self._command, log)
            while not select.select([listener], [], [], 0.1)[0]:
                if self._process.poll() is not None:
                    raise explain_failure(self.folder, world_size, self._command)
                if reason := give_up(self.folder):
                    raise CommunicationError(reason)
            connection = listener.accept()[0]
            self._channel, self._outbox = Channel(connection), Outbox(connection)

    def _check_outside_mpi(self) -> None:
        launched = [name for name in INSIDE_MPI if int(os.environ.get(name, "1")) > 1]
        if launched:
            raise ConfigError(
                f"started by an MPI launcher ({launched[0]} is set); start it directly: it launches its ranks itself"
            )

    def _launch(self, command: list[str], log: IO[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=rank_environment(), start_new_session=True
        )

    def _bind(self, listener: socket.socket) -> str:
        path = str(self.folder / "socket")
        if len(path) > MAX_SOCKET_PATH:
            self._socket_folder = tempfile.TemporaryDirectory(prefix="pt-", dir="/tmp")
            path = f"{self._socket_folder.name}/socket"
        listener.bind(path)
        listener.listen(1)
        return path

    def _send(self, message: Message) -> None:
        self._outbox.put(encode(message))

    def _read(self) -> None:
        """Whatever ends the reading, nobody is left waiting for events that will not come."""
        failure: PtError | None = None
        try:
            for message in self._channel:
                self._dispatch(message)
        except OSError:
            pass  # its ranks have ended
        except Exception as error:
            if not self._closing:
                LOGGER.exception("what rank 0 sent cannot be read")
            failure = CommunicationError("what rank 0 sent cannot be read", detail=f": {type(error).__name__}: {error}")
        try:
            self._end_of_ranks()
            failure = failure or explain_failure(self.folder, self.config.mapping.world_size, self._command)
        finally:
            self._fail(failure or CommunicationError("the engine ended"))

    def _end_of_ranks(self) -> None:
        """Ranks that noticed a failure are on their way out, and their launcher ends the rest. Requests in flight wait
        for the reason."""
        with self._lock:
            self._has_ended = True
        if self._closing:
            self._fail(CommunicationError("the engine was closed"))
        elif self._failure is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(FAILURE_GRACE_S)
            stop(self._process, self.folder, grace_s=FAILURE_GRACE_S)

    def _fail(self, failure: PtError) -> None:
        """Everybody who waits gets the first failure, once."""
        with self._lock:
            if self._failure is not None:
                return
            failure.kind = "unavailable"  # whatever ended the engine, its requests were right
            self._failure = failure
            queues, self._queues = list(self._queues.values()), {}
        for events in queues:
            _put(events, failure)
        self._stats.put(failure)

    def _dispatch(self, message: Message) -> None:
        if message["type"] in ("tokens", "progress", "refused"):
            self.num_signs_of_life += 1
        if message["type"] == "tokens":
            for request_id, tokens, finish_reason, extras in message["outputs"]:
                with self._lock:
                    events = self._queues.pop(request_id, None) if finish_reason else self._queues.get(request_id)
                if events is not None and not _put(events, ("tokens", tokens, finish_reason, extras)):
                    self.cancel(request_id)  # nobody will take the rest
        elif message["type"] == "refused":
            with self._lock:
                events = self._queues.pop(message["id"], None)
            if events is not None:
                _put(events, error_of_kind(message["kind"], message["message"]))
        elif message["type"] == "stats":
            self._stats.put(message["stats"])

    def _end(self) -> None:
        """Leaves no process and no file behind."""
        if hasattr(self, "_process"):
            stop(self._process, self.folder)
        if hasattr(self, "_channel"):
            self._outbox.close()
            self._channel.close()
        if hasattr(self, "_socket_folder"):
            self._socket_folder.cleanup()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> World:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _put(events: Events, event: Any) -> bool:
    """Whether it was taken. One request's queue that fails (its event loop is closed) must not end the others."""
    try:
        events.put(event)
    except Exception:
        LOGGER.exception("an event could not be passed on")
        return False
    return True
