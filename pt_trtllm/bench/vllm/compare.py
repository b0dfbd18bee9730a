"""PT models against a Llama of equal size, in vLLM and in our own engine: all started, then measured in turns.

An idle engine of either kind sleeps, so all of them can be there at once, and whatever else the machine does meets all.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import datetime
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pt_trtllm.bench.links import parse_delay
from pt_trtllm.bench.machine import hardware, versions
from pt_trtllm.bench.measure import Subject
from pt_trtllm.bench.own_engine import OwnEngine
from pt_trtllm.bench.traffic import num_parameters
from pt_trtllm.bench.vllm.engines import Model, SideOptions, make_models
from pt_trtllm.bench.vllm.environment import VllmEnvironment
from pt_trtllm.bench.vllm.operations import Collectives
from pt_trtllm.bench.vllm.report import SideLink, SideReport, VllmReport
from pt_trtllm.bench.vllm.table import with_ratios
from pt_trtllm.bench.vllm.vllm_engine import VllmEngine
from pt_trtllm.bench.workload import Deadline, TimeUp, Workload
from pt_trtllm.errors import CommunicationError, ConfigError
from pt_trtllm.testing.hosts import Hosts

Progress = Callable[[int, int], None]
WORKLOAD = Workload(
    prompt_lengths=(128, 512, 2048), batch_size=32, smaller_batch_sizes=(1, 8), num_requests=16, first_tokens=2
)
OURS = "pt-trtllm"


class Comparison:
    """Everything that stays the same over all links."""

    def __init__(
        self, environment: VllmEnvironment, options: SideOptions, workload: Workload, folder: Path, deadline: Deadline
    ) -> None:
        self.environment, self.options, self.workload, self.folder = environment, options, workload, folder
        self.deadline = deadline
        self.models = make_models(options, workload, folder, deadline.check)

    @contextlib.contextmanager
    def in_vllm(self, deadline: Deadline, hosts: Hosts | None = None) -> Iterator[list[tuple[Model, VllmEngine]]]:
        """Started, warm, and their collectives counted."""
        with contextlib.ExitStack() as stack:
            engines: list[tuple[Model, VllmEngine]] = []
            stack.callback(lambda: _close_all([engine for _, engine in engines]))
            for model in self.models:
                name = f"vLLM: {model.name}"
                engine = VllmEngine(
                    name, model.checkpoint_dir, model.config, self.options.world_size, self.workload, deadline
                )
                engines.append((model, engine))
                engine.start(self.environment, self.folder, self.options.eager, hosts)
                engine.warm_up()
                engine.count_collectives()
                engine.rest()
                if hosts is not None and engine.collectives.shared_memory:
                    raise CommunicationError(f"{name} used shared memory between hosts: nothing would be delayed")
            yield engines

    @contextlib.contextmanager
    def in_our_engine(self, deadline: Deadline, hosts: Hosts | None = None) -> Iterator[list[tuple[Model, OwnEngine]]]:
        with contextlib.ExitStack() as stack:
            engines: list[tuple[Model, OwnEngine]] = []
            stack.callback(lambda: _close_all([engine for _, engine in engines]))
            for model in self.models:
                engine = OwnEngine(f"{OURS}: {model.name}", model.engine_dir, self.workload, deadline)
                engines.append((model, engine))
                engine.start(self.workload.most_cached_tokens, hostfile=hosts.hostfile if hosts else None)
                engine.warm_up()
            yield engines

    def side_reports(self, engines: Sequence[tuple[Model, Subject]], repeats: int) -> list[SideReport]:
        return [self._side_report(model, engine, repeats) for model, engine in engines]

    def _side_report(self, model: Model, engine: Subject, repeats: int) -> SideReport:
        spreads = {
            key: samples.spread(repeats, 1.0 if key.endswith("_per_s") else 1e3)
            for key, samples in engine.samples.items()
        }
        counted = _collectives(engine)
        return SideReport(
            software=engine.name.partition(":")[0],
            model=model.name,
            num_layers=model.config.num_hidden_layers,
            num_tracks=model.config.num_tracks,
            sync_interval=model.config.interval,
            parameters=num_parameters(model.config),
            load_s=engine.load_s,
            ttft_ms={key.partition("/")[2]: spread for key, spread in spreads.items() if key.startswith("ttft/")},
            tpot_ms={key.partition("/")[2]: spread for key, spread in spreads.items() if key.startswith("tpot/")},
            tokens_per_s=spreads.get("tokens_per_s"),
            requests_per_s=spreads.get("requests_per_s"),
            mix_ttft_ms=spreads.get("mix_ttft"),
            mix_latency_ms=spreads.get("mix_latency"),
            all_reduces=counted.all_reduces,
            gathers=counted.gathers,
        )


def compare(
    environment: VllmEnvironment, options: SideOptions, workload: Workload, deadline: Deadline, command: str,
    folder: Path, *, link_delays: Sequence[str] = (), progress: Progress = lambda done, total: None,
) -> VllmReport:  # fmt: skip
    """Measures until every repeat is done or the time is up; raises when not even one was done in shared memory."""
    begin, load_before = time.monotonic(), os.getloadavg()[0]
    share = Deadline(deadline.left_s / (1 + len(link_delays)))
    try:
        comparison = Comparison(environment, options, workload, folder, deadline)
        with comparison.in_vllm(share) as theirs, comparison.in_our_engine(share) as ours:
            everything: list[tuple[Model, Subject]] = [*theirs, *ours]
            done = in_turns([engine for _, engine in everything], progress)
            engines = with_ratios(comparison.side_reports(everything, done)) if done else ()
            arguments, found = theirs[0][1].arguments(options.eager), theirs[0][1].versions
    except TimeUp:
        done = 0
    if not done:
        raise ConfigError(
            f"{share.seconds:.0f} s were not enough to start and measure every engine once; give more --max-seconds, "
            "or ask for less"
        )
    links = over_links(comparison, link_delays, progress)
    return VllmReport(
        command=command,
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
        seconds=time.monotonic() - begin,
        complete=done == workload.repeats
        and len(links) == len(link_delays)
        and all(link.repeats_done == workload.repeats for link in links),
        repeats_done=done,
        hardware=hardware(),
        versions={**versions(), "vLLM": found["vllm"], "its torch": found["torch"]},
        load_average=(load_before, os.getloadavg()[0]),
        workload=dataclasses.asdict(workload),
        compiled=not options.eager,
        vllm_arguments={key: value for key, value in arguments.items() if key != "model"},
        engines=engines,
        links=tuple(links),
    )


def in_turns(engines: Sequence[Subject], progress: Progress) -> int:
    """Whole repeats that were done, until all are or the time is up."""
    repeats = engines[0].workload.repeats
    for done in range(repeats):
        progress(done, repeats)
        try:
            for engine in engines:
                engine.repeat(done)
                engine.rest()
        except TimeUp:
            return done
    progress(repeats, repeats)
    return repeats


def over_links(comparison: Comparison, delays: Sequence[str], progress: Progress) -> list[SideLink]:
    """Each delay with an equal share of the time that is left. What the time is up for is left out.

    vLLM's engines are started once for all links that delay, and once more where nothing is in between. Our own ranks
    ask another host for messages while they are idle: so they are started for each link when vLLM's had their turns.
    """
    links: list[SideLink] = []
    seconds = {delay: parse_delay(delay) for delay in delays}
    for group in ([d for d in delays if not seconds[d]], [d for d in delays if seconds[d]]):
        if not group:
            continue
        with (
            contextlib.suppress(TimeUp),
            Hosts(comparison.options.world_size, seconds[group[0]]) as hosts,
            comparison.in_vllm(comparison.deadline, hosts) as theirs,
        ):
            for index, delay in enumerate(group):
                if index and seconds[delay]:
                    hosts.set_delay(seconds[delay])
                share = Deadline(max(1e-3, comparison.deadline.left_s / (len(delays) - len(links))))
                links.append(_one_link(comparison, hosts, delay, theirs, share, progress))
    return links


def _one_link(
    comparison: Comparison, hosts: Hosts, delay: str, theirs: Sequence[tuple[Model, VllmEngine]], deadline: Deadline,
    progress: Progress,
) -> SideLink:  # fmt: skip
    before = hosts.round_trip_s()
    for _, engine in theirs:
        engine.start_over(deadline)
    done = in_turns([engine for _, engine in theirs], progress)
    reports = comparison.side_reports(theirs, done) if done else []
    with hosts.mpi(), comparison.in_our_engine(deadline, hosts) as ours:
        done = min(done, in_turns([engine for _, engine in ours], progress))
        reports += comparison.side_reports(ours, done) if done else []
    if not done:
        raise TimeUp
    return SideLink(
        delay=delay,
        how=hosts.how,
        round_trip_us=(before * 1e6, hosts.round_trip_s() * 1e6),
        repeats_done=done,
        engines=with_ratios(reports),
    )


def _collectives(engine: Subject) -> Collectives:
    if isinstance(engine, VllmEngine):
        return engine.collectives
    assert isinstance(engine, OwnEngine)
    counted = engine.stats()["sync_points_per_forward"]
    return Collectives(
        all_reduces=counted["track_fusion"] + counted["tensor_parallel"], gathers=counted["logits"], shared_memory=True
    )


def _close_all(engines: Sequence[Subject]) -> None:
    """At once: each takes some seconds."""
    with concurrent.futures.ThreadPoolExecutor(max(1, len(engines))) as pool:
        list(pool.map(lambda engine: engine.close(), engines))
