"""Engines side by side: all started, measured in turns, so that whatever else the machine does meets them all."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import datetime
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pt_trtllm.bench.machine import READ_BYTES, ReadBandwidth, hardware, versions
from pt_trtllm.bench.numbers import Spread
from pt_trtllm.bench.own_engine import OwnEngine
from pt_trtllm.bench.report import DecodeBandwidth, EngineReport, Report
from pt_trtllm.bench.steps import decode_steps, empty_call_s, step_times, timeline
from pt_trtllm.bench.table import with_ratios
from pt_trtllm.bench.traffic import kv_bytes_per_step, layer_flop_per_token, num_parameters, weight_bytes_per_step
from pt_trtllm.bench.workload import Deadline, TimeUp, Workload
from pt_trtllm.checkpoint.artifact import replace_file
from pt_trtllm.engine.bundle import engine_file, open_bundle
from pt_trtllm.errors import ConfigError
from pt_trtllm.mapping import sync_counts, sync_plan
from pt_trtllm.trace import Span, chrome_trace, spans_of

Progress = Callable[[int, int], None]


def compare(
    engines: Sequence[tuple[str, Path]],
    workload: Workload,
    deadline: Deadline,
    command: str,
    *,
    read_bytes: int = READ_BYTES,
    progress: Progress = lambda done, total: None,
    trace_file: Path | None = None,
    hostfile: Path | None = None,
) -> Report:
    """Measures (name, engine folder) pairs until every repeat is done or the time is up.

    Raises when the time was up before every engine was measured once. With `trace_file` (Chrome's trace format),
    every engine is then run once more to record its steps: what was measured before was not slowed by it.
    """
    configs = [open_bundle(folder)[0] for _, folder in engines]
    workload.check([config.limits for config in configs])
    begin, load_before = time.monotonic(), os.getloadavg()[0]
    subjects = [OwnEngine(name, folder, workload, deadline) for name, folder in engines]
    reading: dict[int, list[float]] = {config.mapping.world_size: [] for config in configs}
    done, complete = 0, True
    with contextlib.ExitStack() as stack:
        try:
            readers = {}
            for size in reading:
                with deadline.enforced():
                    readers[size] = stack.enter_context(ReadBandwidth(size, read_bytes))
            stack.callback(_close_all, subjects)
            for subject, config in zip(subjects, configs, strict=True):
                subject.start(workload.cache_tokens(config.limits), hostfile=hostfile)
                subject.warm_up()
            for done in range(workload.repeats):
                progress(done, workload.repeats)
                for size, reader in readers.items():
                    with deadline.enforced():
                        reading[size].append(reader.measure())
                for subject in subjects:
                    subject.repeat(done)
            done = workload.repeats
        except TimeUp:
            complete = False
            if not done:
                raise ConfigError(
                    f"{deadline.seconds:.0f} s were not enough to measure every engine once; give more --max-seconds, "
                    "or ask for less"
                ) from None
        progress(workload.repeats, workload.repeats)
        reports = [_engine_report(subject, reading, done) for subject in subjects]
    if trace_file is not None and complete:
        try:
            reports = _with_steps(reports, _traced(engines, workload, deadline, trace_file), workload)
        except TimeUp:
            complete = False
    report = Report(
        command=command,
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
        seconds=time.monotonic() - begin,
        complete=complete,
        repeats_done=done,
        hardware=hardware(),
        versions=versions(),
        load_average=(load_before, os.getloadavg()[0]),
        workload=dataclasses.asdict(workload),
        engines=tuple(reports),
    )
    return with_ratios(report)


def _close_all(subjects: Sequence[OwnEngine]) -> None:
    """At once: an engine that is in the middle of a long prompt ends some seconds later."""
    with concurrent.futures.ThreadPoolExecutor(len(subjects)) as pool:
        list(pool.map(OwnEngine.close, subjects))


def _traced(
    engines: Sequence[tuple[str, Path]], workload: Workload, deadline: Deadline, trace_file: Path
) -> dict[str, dict[str, list[Span]]]:
    """Engine -> rank -> spans of decoding, from worlds of their own; all of it in one file as well."""
    spans = {}
    with tempfile.TemporaryDirectory(prefix="pt-bench-trace-") as folder:
        for index, (name, engine_dir) in enumerate(engines):
            own = Path(folder) / f"{index}.json"
            with OwnEngine(name, engine_dir, workload, deadline) as subject:
                subject.start(workload.cache_tokens(open_bundle(engine_dir)[0].limits), own)
                subject.decode()
            spans[name] = spans_of(json.loads(own.read_text()))
    with replace_file(trace_file) as path:
        path.write_text(json.dumps(chrome_trace(spans)))
    return spans


def _with_steps(
    reports: Sequence[EngineReport], traces: dict[str, dict[str, list[Span]]], workload: Workload
) -> list[EngineReport]:
    call_s, found = empty_call_s(), []
    for report in reports:
        ranks = traces[report.name]
        first = next(iter(ranks.values()))
        times = {str(batch): step_times(decode_steps(first, batch), call_s) for batch in workload.batch_sizes}
        found.append(
            dataclasses.replace(
                report,
                decode_steps={batch: steps for batch, steps in times.items() if steps is not None},
                timeline=timeline(ranks, workload.batch_sizes[0]),
            )
        )
    return found


def _engine_report(subject: OwnEngine, reading: dict[int, list[float]], repeats: int) -> EngineReport:
    """From whole repeats only: an engine measured once more than another would not be compared fairly."""
    config, stats = subject.config, subject.stats()
    checkpoint, mapping = config.checkpoint, config.mapping
    spreads = {
        key: samples.spread(repeats, 1.0 if key.endswith("_per_s") else 1e3) for key, samples in subject.samples.items()
    }
    machine = Spread.of(reading[mapping.world_size], scale=1e-9)
    tpot = _under("tpot/", spreads)
    return EngineReport(
        name=subject.name,
        world_size=mapping.world_size,
        num_tracks=mapping.num_tracks,
        num_layers=checkpoint.model.num_hidden_layers,
        sync_interval=checkpoint.model.interval,
        dtype=checkpoint.dtype,
        quantization=checkpoint.quantization.method,
        parameters=num_parameters(checkpoint.model),
        prefill_tflop_per_s={
            length: int(length) * layer_flop_per_token(checkpoint.model) / spread.median * 1e3 / 1e12
            for length, spread in _under("ttft/", spreads).items()
        },
        decode_tokens_per_s={batch: int(batch) / spread.median * 1e3 for batch, spread in tpot.items()},
        own_work_us={name: phase.own_work_us for name, phase in subject.phases.items()},
        decode_steps={},
        timeline={},
        engine_bytes=sum((subject.engine_dir / engine_file(r)).stat().st_size for r in range(mapping.world_size)),
        load_s=subject.load_s,
        ttft_ms=_under("ttft/", spreads),
        tpot_ms=tpot,
        tokens_per_s=spreads.get("tokens_per_s"),
        requests_per_s=spreads.get("requests_per_s"),
        mix_ttft_ms=spreads.get("mix_ttft"),
        mix_latency_ms=spreads.get("mix_latency"),
        forward_passes=stats["forward_passes"],
        collectives_per_pass=stats["sync_points_per_forward"],
        collectives_planned=sync_counts(sync_plan(checkpoint.model, mapping)),
        collective_share={
            name: phase.seconds_in_collectives / phase.seconds_in_forward
            for name, phase in subject.phases.items()
            if phase.seconds_in_forward
        },
        peak_rss_mb=[size / 1e6 for size in subject.peak_rss_bytes() if size],
        decode_bandwidth={
            batch: _decode_bandwidth(subject, int(batch), spread.median / 1e3, machine.median)
            for batch, spread in tpot.items()
        },
        machine_read_gb_per_s=machine,
    )


def _decode_bandwidth(subject: OwnEngine, batch: int, step_s: float, machine_gb_per_s: float) -> DecodeBandwidth:
    context = subject.workload.mean_context
    weights = weight_bytes_per_step(subject.engine_dir, subject.config, batch)
    past = kv_bytes_per_step(subject.config, batch, context)
    gb_per_s = (weights + past) / step_s / 1e9
    return DecodeBandwidth(
        weight_bytes_per_step=weights,
        kv_bytes_per_step=past,
        gb_per_s=gb_per_s,
        share_of_machine=gb_per_s / machine_gb_per_s,
    )


def _under(prefix: str, spreads: dict[str, Spread]) -> dict[str, Spread]:
    return {key.removeprefix(prefix): spread for key, spread in spreads.items() if key.startswith(prefix)}
