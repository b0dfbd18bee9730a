"""What the core publishes on Triton's metrics port.

The `nv_*` families are those that dashboards for TensorRT-LLM's backend know; times and totals, which they lack, are
ours. Triton's own durations mean little for a decoupled model: they end when `execute` returns.
"""

from __future__ import annotations

import json
import time
from typing import Any

import triton_python_backend_utils as pb_utils

from pt_trtllm.engine.bundle import BuildLimits
from pt_trtllm.network.kv_cache import BLOCK_TOKENS
from pt_trtllm.serving.answer import Answer

TOKEN_BUCKETS = [10.0, 50.0, 100.0, 500.0, 1000.0]
SECONDS_BUCKETS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
TOKEN_SECONDS_BUCKETS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0]
GAUGES = {
    "nv_trt_llm_request_metrics": ("Requests by state", "request_type"),
    "nv_trt_llm_kv_cache_block_metrics": ("Blocks of the KV cache", "kv_cache_block_type"),
    "nv_trt_llm_inflight_batcher_metrics": ("The running batch", "inflight_batcher_specific_metric"),
    "nv_trt_llm_general_metrics": ("Time of these values, and passes so far", "general_type"),
}
COUNTERS = {
    "pt_tokens_total": ("Tokens: of prompts, of prompts taken from the cache, generated", "kind"),
    "pt_sync_points_total": ("Collectives of all passes", "kind"),
    "pt_requests_total": ("Answers by the reason they ended", "finish_reason"),
    "pt_engine_restarts_total": ("Times the engine was started again", "reason"),
}
HISTOGRAMS = {
    "nv_llm_input_token_len": ("Tokens of prompts", "response_metric_type", "total_input_tokens", TOKEN_BUCKETS),
    "nv_llm_output_token_len": ("Tokens of answers", "response_metric_type", "total_output_tokens", TOKEN_BUCKETS),
    "pt_time_to_first_token_seconds": ("From arrival to the first token", "kind", "all", SECONDS_BUCKETS),
    "pt_time_per_output_token_seconds": ("Mean from the second token on", "kind", "all", TOKEN_SECONDS_BUCKETS),
    "pt_request_seconds": ("From arrival to the end", "kind", "all", SECONDS_BUCKETS),
}  # fmt: skip


class EngineMetrics:
    def __init__(self, model: str, version: str, limits: BuildLimits) -> None:
        self._labels, self._limits = {"model": model, "version": version}, limits
        self._extra: dict[str, str] = {}
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, str], Any] = {}
        self._seen: dict[tuple[str, str], float] = {}
        """What a counter's source said last; it begins again with a new engine."""
        for name, (text, extra) in GAUGES.items():
            self._add_family(name, text, extra, pb_utils.MetricFamily.GAUGE)
        for name, (text, extra) in COUNTERS.items():
            self._add_family(name, text, extra, pb_utils.MetricFamily.COUNTER)
        for name, (text, extra, value, buckets) in HISTOGRAMS.items():
            self._add_family(name, text, extra, pb_utils.MetricFamily.HISTOGRAM)
            self._metrics[name, ""] = self._families[name].Metric(
                labels={**self._labels, extra: value}, buckets=buckets
            )
        self._metric("pt_engine_restarts_total", "failure")

    def answered(self, answer: Answer, finish_reason: str) -> None:
        """Counts an answer that has ended."""
        now = time.monotonic()
        self._metric("pt_requests_total", finish_reason).increment(1)
        self._metrics["nv_llm_input_token_len", ""].observe(len(answer.request.prompt_ids))
        self._metrics["nv_llm_output_token_len", ""].observe(answer.num_tokens)
        self._metrics["pt_request_seconds", ""].observe(now - answer.started)
        if answer.first_token is not None:
            self._metrics["pt_time_to_first_token_seconds", ""].observe(answer.first_token - answer.started)
            if answer.num_tokens > 1:
                per_token = (now - answer.first_token) / (answer.num_tokens - 1)
                self._metrics["pt_time_per_output_token_seconds", ""].observe(per_token)

    def restarted(self) -> None:
        self._metric("pt_engine_restarts_total", "failure").increment(1)

    def update(self, stats: dict[str, Any] | None, num_in_flight: int) -> None:
        """From the engine's own counts; None while it is not running."""
        stats = stats or {}
        running, waiting = stats.get("running", 0), stats.get("waiting", 0)
        blocks, used = stats.get("kv_blocks", 0), stats.get("kv_blocks_used", 0)
        passes = stats.get("forward_passes", 0)
        values = {
            "nv_trt_llm_request_metrics": {
                "active": num_in_flight, "max": self._limits.max_batch_size, "scheduled": running, "waiting": waiting,
            },
            "nv_trt_llm_kv_cache_block_metrics": {
                "max": blocks, "free": blocks - used, "used": used, "tokens_per": BLOCK_TOKENS,
                "reused": stats.get("reused_tokens", 0) // BLOCK_TOKENS, "fraction": used / blocks if blocks else 0.0,
            },
            "nv_trt_llm_inflight_batcher_metrics": {
                "generation_requests": running, "total_context_tokens": stats.get("prompt_tokens", 0),
                "micro_batch_id": 0, "paused_requests": stats.get("preemptions", 0),
            },
            "nv_trt_llm_general_metrics": {"timestamp": time.time(), "iteration_counter": passes},
        }  # fmt: skip
        for name, by_value in values.items():
            for extra, value in by_value.items():
                self._metric(name, extra).set(value)
        for kind in ("prompt", "generated", "reused"):
            self._count("pt_tokens_total", kind, stats.get(f"{kind}_tokens", 0))
        for kind, per_pass in stats.get("sync_points_per_forward", {}).items():
            self._count("pt_sync_points_total", kind, per_pass * passes)

    def _count(self, name: str, extra: str, total: float) -> None:
        before = self._seen.get((name, extra), 0)
        self._seen[name, extra] = total
        self._metric(name, extra).increment(total - before if total >= before else total)

    def _metric(self, name: str, extra: str) -> Any:
        if (name, extra) not in self._metrics:
            labels = {**self._labels, self._extra[name]: extra}
            self._metrics[name, extra] = self._families[name].Metric(labels=labels)
        return self._metrics[name, extra]

    def _add_family(self, name: str, text: str, extra: str, kind: Any) -> None:
        self._families[name] = pb_utils.MetricFamily(name=name, description=text, kind=kind)
        self._extra[name] = extra


def log_request(request_id: str, answer: Answer, finish_reason: str, error: Exception | None) -> None:
    """One line of JSON per answer in the server's log."""
    first = answer.first_token
    pb_utils.Logger.log_info(
        json.dumps(
            {
                "event": "answer",
                "request_id": request_id,
                "prompt_tokens": len(answer.request.prompt_ids),
                "output_tokens": answer.num_tokens,
                "finish_reason": finish_reason,
                "first_token_ms": None if first is None else round((first - answer.started) * 1e3, 3),
                "total_ms": round((time.monotonic() - answer.started) * 1e3, 3),
                **({"error": str(error)} if error is not None else {}),
            }
        )
    )
