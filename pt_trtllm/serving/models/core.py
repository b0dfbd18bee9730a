"""The `tensorrt_llm` model: token ids to token ids, by an engine that runs as an MPI world of its own.

Triton calls `execute`, which only hands requests over. One thread takes events from all running requests, in the order
they come, and is the only one that talks to Triton about them.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from pt_trtllm import env
from pt_trtllm.errors import ConfigError, PtError
from pt_trtllm.runtime.options import RuntimeOptions
from pt_trtllm.runtime.request import Request
from pt_trtllm.serving.answer import Answer
from pt_trtllm.serving.control import END, DrainFollower
from pt_trtllm.serving.models.call import Call, CallOptions, Part, parts_of
from pt_trtllm.serving.models.decode import decode_requests, prompt_text
from pt_trtllm.serving.models.health import HealthSignal
from pt_trtllm.serving.models.metrics import EngineMetrics, log_request
from pt_trtllm.serving.models.triton import (
    FINAL,
    error_response,
    flag,
    is_decoupled,
    open_tokenizer,
    parameters,
    scalar,
)
from pt_trtllm.serving.models.unary import UnaryCall, refuse_stream
from pt_trtllm.serving.supervisor import EngineSettings, EngineSupervisor, Unavailable
from pt_trtllm.serving.threads import Complaints, start_essential

TIMEOUT, CANCELLED = "timeout", "cancelled"


class CoreModel:
    def initialize(self, args: dict[str, str]) -> None:
        values = parameters(args)
        self._tokenizer = open_tokenizer(values)
        self._exclude = flag(values.get("exclude_input_in_output"), False, "exclude_input_in_output")
        self._is_decoupled = is_decoupled(args)
        self._period_s = int(values.get("cancellation_check_period_ms", "100")) / 1e3
        self._complain = Complaints(pb_utils.Logger.log_error)
        self._calls: dict[str, Call] = {}
        """By stream id."""
        self._lock = threading.Lock()
        self._news: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        self._owners: dict[Answer, Call] = {}
        self._stops: list[str] = []
        self._next_check = time.monotonic()
        """When the sender looks at all calls again: soon, and when one of them is out of time."""
        self._engine = EngineSupervisor(_settings(values), self._report)
        self._health = HealthSignal()
        folder = env.TRITON_CONTROL_DIR.get()
        self._drain = DrainFollower(Path(folder) if folder else None)
        self._metrics = EngineMetrics(args["model_name"], args["model_version"], self._engine.config.limits)
        self._stats_period_s = int(values.get("stats_check_period_ms", "1000")) / 1e3
        self._closing = threading.Event()
        self._sender = start_essential("pt-trtllm-sender", self._send_all)
        self._publisher = start_essential("pt-trtllm-stats", self._publish_stats)
        start_essential("pt-trtllm-orphan", partial(self._leave_with_server, os.getppid()))

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            try:
                if scalar(request, "stop"):
                    self._stop(request)
                else:
                    self._accept(request)
            except Exception as error:  # one bad request must not fail the others
                _refuse(request, error)

    def finalize(self) -> None:
        self._closing.set()
        self._engine.close()
        self._publisher.join()
        self._news.put(None)
        self._sender.join()

    def _accept(self, request: Any) -> None:
        if self._drain.order:
            raise Unavailable("the server is shutting down; ask another one")
        wanted = decode_requests(request, self._engine.config, self._tokenizer)
        if not wanted:
            raise ConfigError("input_ids has no prompt, expected at least one")
        options = self._call_options(request)
        call = self._new_call(request, options, wanted)
        for row, own in enumerate(wanted):
            before = prompt_text(request, own, row, self._tokenizer) if options.include_prompt else ""
            for index, sample in enumerate(parts_of(own)):
                answer = Answer(sample, self._tokenizer, self._news.put)
                call.parts[answer] = Part(answer, row, index, list(own.prompt_ids), before)
        answers = list(call.parts)
        with self._lock:
            self._calls[call.stream_id] = call
            self._owners.update(dict.fromkeys(answers, call))
            is_next = call.deadline < self._next_check
            self._next_check = min(self._next_check, call.deadline)
        if is_next:
            self._news.put(answers[0])  # the sender waits for what was next before
        try:
            ids = self._engine.submit([(answer.request, answer) for answer in answers])
        except BaseException:
            self._forget(call)
            raise
        for answer, request_id in zip(answers, ids, strict=True):
            answer.id = request_id
        if call.done:
            self._cancel(call, CANCELLED)  # it was given up before its ids were known

    def _new_call(self, request: Any, options: CallOptions, wanted: list[Request]) -> Call:
        samples = [own.params.n for own in wanted]
        if self._is_decoupled:
            return Call(request, options, len(wanted), samples[0])
        refuse_stream(options.streaming, "stream (streaming)")
        if len(set(samples)) > 1:
            raise ConfigError(f"num_return_sequences is {samples}, expected the same for all prompts of a request")
        return UnaryCall(request, options, len(wanted), samples[0], scalar(request, "pad_id") or 0)

    def _call_options(self, request: Any) -> CallOptions:
        exclude = scalar(request, "exclude_input_in_output")
        timeout_s = scalar(request, "timeout_s")
        if timeout_s is not None and not timeout_s > 0:
            raise ConfigError(f"timeout_s is {timeout_s}, expected above 0")
        return CallOptions(
            streaming=bool(scalar(request, "streaming")),
            include_prompt=not (self._exclude if exclude is None else exclude),
            log_probs=bool(scalar(request, "return_log_probs")) or scalar(request, "num_logprobs") is not None,
            count_input=bool(scalar(request, "return_num_input_tokens")),
            count_output=bool(scalar(request, "return_num_output_tokens")),
            times=bool(scalar(request, "return_perf_metrics")),
            timeout_s=timeout_s if timeout_s is not None else (request.timeout() / 1e6 or None),
            outputs=frozenset(request.requested_output_names()),
        )

    def _stop(self, request: Any) -> None:
        """Ends the requests with this id, or the stream that `postprocessing` names; they end with what they have."""
        name = request.request_id()
        if not name:
            raise ConfigError("stop needs the id of the request that is to be stopped; send it as the request id")
        with self._lock:
            self._stops.append(name)
        if self._is_decoupled:
            request.get_response_sender().send(flags=FINAL)
        else:
            request.get_response_sender().send(pb_utils.InferenceResponse([]), flags=FINAL)

    def _send_all(self) -> None:
        """The only thread that talks to Triton about running requests: what fails for one of them is that one's own."""
        while True:
            try:
                answer = self._news.get(timeout=max(0.0, self._next_check - time.monotonic()))
                if answer is None:
                    return
                self._of_one(self._owners.get(answer), self._send, answer)
            except queue.Empty:
                pass
            if time.monotonic() >= self._next_check:
                self._check_calls()

    def _of_one(self, call: Call | None, work: Callable[..., None], *arguments: Any) -> None:
        """Does something for a call, which alone ends should that fail."""
        if call is None:
            return
        try:
            work(call, *arguments)
        except Exception as error:
            self._complain(f"request {call.request_id or call.stream_id} was given up", error)
            call.give_up(error)
            self._cancel(call, CANCELLED)
            self._forget(call)

    def _send(self, call: Call, answer: Answer) -> None:
        piece = answer.take()
        if piece is None:
            return
        call.send(call.parts[answer], piece)
        if piece.finish_reason:
            self._metrics.answered(answer, piece.finish_reason)
            log_request(call.request_id or call.stream_id, answer, piece.finish_reason, piece.error)
        if call.done:
            self._cancel(call, CANCELLED)  # after an error: the other answers of the call
            self._forget(call)

    def _check_calls(self) -> None:
        with self._lock:
            stops, self._stops = self._stops, []
        order = self._look_for_orders()
        for call in list(self._calls.values()):
            is_stopped = order == END or call.request_id in stops or call.stream_id in stops
            self._of_one(call, self._check, is_stopped)
        with self._lock:
            now = time.monotonic()
            deadlines = [call.deadline for call in self._calls.values() if call.deadline >= now]
            self._next_check = min([now + self._period_s, *deadlines])

    def _check(self, call: Call, is_stopped: bool) -> None:
        if is_stopped or call.is_cancelled():
            self._cancel(call, CANCELLED)
        elif time.monotonic() > call.deadline:
            self._cancel(call, TIMEOUT)

    def _look_for_orders(self) -> str:
        before = self._drain.order
        try:
            order = self._drain.look(len(self._calls))
        except OSError as error:  # a full disk
            self._complain("the server's orders cannot be read or answered", error)
            return before
        if order and not before:
            self._health.failed("the server is shutting down")
        return order

    def _cancel(self, call: Call, reason: str) -> None:
        for answer in call.parts:
            if not answer.finished and answer.id is not None and answer.ended_as is None:
                answer.ended_as = reason
                self._engine.cancel(answer.id)

    def _forget(self, call: Call) -> None:
        with self._lock:
            self._calls.pop(call.stream_id, None)
            for answer in call.parts:
                self._owners.pop(answer, None)

    def _report(self, ready: bool, reason: str) -> None:
        if ready:
            pb_utils.Logger.log_info("the engine runs again")
            self._metrics.restarted()
            self._health.recovered()
        else:
            pb_utils.Logger.log_error(f"the engine failed and will be restarted: {reason}")
            self._health.failed(reason)

    def _publish_stats(self) -> None:
        while not self._closing.wait(self._stats_period_s):
            try:
                stats = self._engine.stats()
                self._metrics.update(stats, len(self._owners))  # those that are not yet counted as ended
            except Exception as error:
                self._complain("metrics were not set", error)

    def _leave_with_server(self, server_pid: int) -> None:
        """A server that was killed cannot end its models; they must not outlive it."""
        while os.getppid() == server_pid:
            time.sleep(0.5)
        try:
            self._engine.close()
        finally:
            os._exit(1)


def _refuse(request: Any, error: Exception) -> None:
    try:
        request.get_response_sender().send(error_response(error), flags=FINAL)
    except Exception as again:  # the other requests of the same call go on
        pb_utils.Logger.log_error(f"a request could not be refused: {type(again).__name__}: {again}")


def _settings(values: dict[str, str]) -> EngineSettings:
    if "gpt_model_path" not in values:
        raise ConfigError("config.pbtxt sets no gpt_model_path, expected the folder of an engine")
    try:
        options = RuntimeOptions(
            max_tokens_in_paged_kv_cache=int(values.get("max_tokens_in_paged_kv_cache", "0")),
            kv_cache_free_mem_fraction=float(values.get("kv_cache_free_gpu_mem_fraction", "0.5")),
            enable_block_reuse=flag(values.get("enable_kv_cache_reuse"), True, "enable_kv_cache_reuse"),
            scheduler_policy=values.get("batch_scheduler_policy", "guaranteed_no_evict"),
        )
        return EngineSettings(
            engine_dir=Path(values["gpt_model_path"]),
            tokenizer_dir=Path(values["tokenizer_dir"]),
            hostfile=Path(values["hostfile"]) if "hostfile" in values else None,
            options=options,
            max_queue_size=int(values.get("max_queue_size", "256")),
            step_timeout_s=float(values.get("step_timeout_s", "60")),
        )
    except PtError:
        raise
    except ValueError as error:
        raise ConfigError(f"config.pbtxt has a parameter that is not a number: {error}") from None
