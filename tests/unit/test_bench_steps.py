"""Steps and timelines from the spans of ranks, and engines of random weights."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from pt_trtllm.bench.random_engine import write_random_engine
from pt_trtllm.bench.shapes import SHAPES, ShapeOptions
from pt_trtllm.bench.steps import decode_steps, empty_call_s, step_times, timeline
from pt_trtllm.bench.timeline import KINDS
from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.checkpoint.quantize import Quantization
from pt_trtllm.checkpoint.safetensors_io import read_header
from pt_trtllm.engine.build import BuildOptions, build
from pt_trtllm.engine.bundle import BuildLimits, EngineConfig, engine_file, open_bundle
from pt_trtllm.mapping import SYNC_KINDS
from pt_trtllm.native import timed
from pt_trtllm.testing.big_checkpoint import write_big_checkpoint
from pt_trtllm.trace import CallTimer, Span, Tracer, chrome_trace, spans_from_bytes, spans_of

pytestmark = pytest.mark.unit


def step(start: float, tokens: int) -> list[Span]:
    """10 ms: schedule 1, broadcast 1, report 1, forward 6 (fusion 2 of it, kernels 3 in 100 calls), sample 1."""
    at = [start + 1e-3 * offset for offset in (0, 1, 2, 3, 5, 7, 9, 10)]
    return [
        Span("schedule", at[0], at[1]),
        Span("broadcast", at[1], at[2]),
        Span("report", at[2], at[3]),
        Span("track_fusion", at[4], at[5]),
        Span("forward", at[3], at[6], tokens, kernel_s=3e-3, kernel_calls=100),
        Span("sample", at[6], at[7]),
    ]


RANK0 = [span for i, tokens in enumerate([32, 1, 1, 1, 1, 8]) for span in step(i * 0.01, tokens)]


def test_steps_of_a_batch_are_found_and_divided() -> None:
    steps = decode_steps(RANK0, 1)
    assert [found[0].start for found in steps] == [0.01, 0.02, 0.03, 0.04]
    times = step_times(steps, call_s=1e-5)
    assert times is not None
    assert (times.num_steps, times.kernel_calls) == (4, 100)
    assert times.step_ms.median == pytest.approx(10)
    assert times.own_work_us.median == pytest.approx(3000)
    assert times.kernel_share == pytest.approx(0.2)  # 3 ms less 100 calls of 10 us
    assert times.collective_share == pytest.approx(0.3)
    assert times.other_share == pytest.approx(0.5)
    assert step_times(decode_steps(RANK0, 2), 0.0) is None


def test_what_comes_before_a_step_belongs_to_it_and_the_last_report_to_none() -> None:
    def called(*names: str) -> list[Span]:
        return [Span(name, 0.0, 1.0, tokens=int(name == "forward")) for name in names]

    first = called("draft", "schedule", "broadcast", "report", "forward", "sample")
    idle = called("report", "messages")
    second = called("messages", "schedule", "broadcast", "report", "forward", "sample")
    assert decode_steps([*first, *idle, *second, *called("report")], 1) == [first, second]


def test_a_timeline_shows_steps_from_the_middle_on_all_ranks() -> None:
    rank1 = [Span("broadcast", 0.0, 0.012), Span("forward", 0.012, 0.018, 1), Span("forward", 0.052, 0.058, 8)]
    bars = timeline({"rank 0": RANK0, "rank 1": rank1}, 1)
    assert [bar.name for bar in bars["rank 0"][:5]] == ["schedule", "broadcast", "report", "forward", "track_fusion"]
    assert bars["rank 0"][-1].start + bars["rank 0"][-1].duration == pytest.approx(30_000)
    assert [(bar.name, round(bar.start), round(bar.duration)) for bar in bars["rank 1"]] == [
        ("broadcast", 0, 2000),
        ("forward", 2000, 6000),
    ]
    assert timeline({"rank 0": []}, 1) == {}


def test_a_timeline_shows_no_step_of_another_size_between_its_own() -> None:
    def bars_of(*sizes: int) -> tuple[int, float]:
        spans = [span for i, tokens in enumerate(sizes) for span in step(i * 0.01, tokens)]
        bars = timeline({"rank 0": spans}, 1)["rank 0"]
        return sum(bar.name == "track_fusion" for bar in bars), bars[-1].start + bars[-1].duration

    assert bars_of(32, 1, 1, 1, 96, 1, 3, 3, 3) == (3, pytest.approx(30_000))  # one came alone, before the others
    assert bars_of(32, 1, 32, 1, 1, 32, 1) == (2, pytest.approx(20_000))


def test_every_lap_has_a_colour() -> None:
    assert {span.name for span in RANK0} | {*SYNC_KINDS, "messages", "draft"} == set(KINDS)


def test_a_tracer_keeps_the_last_spans_and_all_sums() -> None:
    kernels = CallTimer()
    trace = Tracer(max_spans=2, kernels=kernels)
    work = timed(time.sleep, kernels)
    trace.begin()
    work(0.001)
    work(0.001)
    trace.lap("forward", 3)
    trace.lap("sample")
    trace.lap("forward", 4)
    kept = spans_from_bytes(trace.to_bytes())
    assert [(span.name, span.tokens, span.kernel_calls) for span in kept] == [("sample", 0, 0), ("forward", 4, 0)]
    assert trace.seconds["forward"] >= kernels.seconds >= 0.002
    assert kept[0].end == kept[1].start
    silent = Tracer()
    silent.lap("forward", 1)
    silent.add("logits", 0.0, 1.0)
    assert spans_from_bytes(silent.to_bytes()) == []
    assert silent.seconds["forward"] > 0


def test_a_chrome_trace_gives_every_rank_a_process_and_reads_back() -> None:
    shifted = [Span(s.name, s.start + 5, s.end + 5, s.tokens, s.kernel_s, s.kernel_calls) for s in RANK0]
    trace = json.loads(json.dumps(chrome_trace({"PT": {"rank 0": shifted, "rank 1": []}, "TP": {"rank 0": RANK0}})))
    names = {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    assert list(names.values()) == ["PT rank 0", "PT rank 1", "TP rank 0"]
    assert len(names) == 3
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert min(event["ts"] for event in events) == 0  # every world begins at 0
    assert all({"ts", "dur", "pid", "tid", "name"} <= set(event) for event in events)
    back = spans_of(trace)
    assert [span.name for span in back["PT rank 0"]] == [span.name for span in RANK0]
    for found, made in zip(back["PT rank 0"], RANK0, strict=True):
        assert (found.tokens, found.kernel_calls) == (made.tokens, made.kernel_calls)
        assert (found.start, found.end, found.kernel_s) == pytest.approx(
            (made.start, made.end, made.kernel_s), abs=1e-8
        )


def test_an_empty_call_takes_little_but_something() -> None:
    assert empty_call_s() > 0


@pytest.mark.parametrize("method", ["none", "int8_wo", "int4_wo"])
@pytest.mark.parametrize("models", ["pt", "tp", "one"])
def test_a_random_engine_is_laid_out_as_a_built_one(tmp_path: Path, method: str, models: str) -> None:
    quantization = Quantization(method=method, group_size=32)
    options = ShapeOptions(shape=SHAPES["tiny"], models=(models,), quantizations=(quantization,))
    (checkpoint,) = options.checkpoints().values()
    limits = BuildLimits(max_seq_len=64)
    write_big_checkpoint(tmp_path / "source", 0, checkpoint.model)
    converting = ConvertOptions(world_size=checkpoint.world_size, dtype="bfloat16", quantization=quantization)
    convert(tmp_path / "source", tmp_path / "checkpoint", converting)
    config = build(tmp_path / "checkpoint", tmp_path / "built", BuildOptions(limits=limits))
    write_random_engine(
        tmp_path / "random",
        EngineConfig(backend="cpu", checkpoint=checkpoint, limits=config.limits),
        lambda done, total: None,
    )
    assert open_bundle(tmp_path / "random")[0] == config
    for rank in range(checkpoint.world_size):
        built, random = (read_header(tmp_path / name / engine_file(rank)) for name in ("built", "random"))
        assert random == built
        assert all(info.dtype in (torch.bfloat16, torch.int8, torch.uint8) for info in random[0].values())
