"""Engines side by side: all started, measured in turns, so that whatever else the machine does meets them all."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pt_trtllm.bench.machine import READ_BYTES, ReadBandwidth, hardware, versions
from pt_trtllm.bench.measure import Subject
from pt_trtllm.bench.numbers import Spread
from pt_trtllm.bench.report import DecodeBandwidth, EngineReport, Report
from pt_trtllm.bench.table import with_ratios
from pt_trtllm.bench.traffic import kv_bytes_per_step, num_parameters, weight_bytes_per_step
from pt_trtllm.bench.workload import Deadline, TimeUp, Workload
from pt_trtllm.engine.bundle import engine_file, open_bundle
from pt_trtllm.errors import ConfigError
from pt_trtllm.mapping import sync_counts, sync_plan

Progress = Callable[[int, int], None]


def compare(
    engines: Sequence[tuple[str, Path]],
    workload: Workload,
    deadline: Deadline,
    command: str,
    *,
    read_bytes: int = READ_BYTES,
    progress: Progress = lambda done, total: None,
) -> Report:
    """Measures (name, engine folder) pairs until every repeat is done or the time is up.

    Raises when the time was up before every engine was measured once.
    """
    configs = [open_bundle(folder)[0] for _, folder in engines]
    workload.check([config.limits for config in configs])
    begin, load_before = time.monotonic(), os.getloadavg()[0]
    subjects = [Subject(name, folder, workload, deadline) for name, folder in engines]
    reading: dict[int, list[float]] = {config.mapping.world_size: [] for config in configs}
    done, complete = 0, True
    with contextlib.ExitStack() as stack:
        try:
            readers = {}
            for size in reading:
                with deadline.enforced():
                    readers[size] = stack.enter_context(ReadBandwidth(size, read_bytes))
            for subject, config in zip(subjects, configs, strict=True):
                stack.enter_context(subject).start(workload.cache_tokens(config.limits))
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


def _engine_report(subject: Subject, reading: dict[int, list[float]], repeats: int) -> EngineReport:
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


def _decode_bandwidth(subject: Subject, batch: int, step_s: float, machine_gb_per_s: float) -> DecodeBandwidth:
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
