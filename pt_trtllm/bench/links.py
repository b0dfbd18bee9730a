"""The same engines over slower links: one rank in each of several network namespaces, MPI over TCP with a delay."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pt_trtllm.bench.compare import Progress, compare
from pt_trtllm.bench.report import LinkReport
from pt_trtllm.bench.workload import Deadline, Workload
from pt_trtllm.engine.bundle import open_bundle
from pt_trtllm.errors import ConfigError
from pt_trtllm.testing.hosts import Hosts

UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def parse_delay(text: str) -> float:
    """50us, 0.2ms -> seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(us|ms|s)", text.strip())
    if not found:
        raise ConfigError(f"--link-delay is {text!r}, expected a number with us or ms, such as 50us")
    return float(found[1]) * UNITS[found[2]]


def num_hosts(engines: Sequence[tuple[str, Path]]) -> int:
    """One per rank. Raises when the engines differ, or have no link at all."""
    sizes = {name: open_bundle(folder)[0].mapping.world_size for name, folder in engines}
    if len(set(sizes.values())) > 1 or 1 in sizes.values():
        found = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ConfigError(f"a link delay needs engines of equally many ranks, at least 2; these have: {found}")
    return next(iter(sizes.values()))


def over_links(
    engines: Sequence[tuple[str, Path]],
    workload: Workload,
    delays: Sequence[str],
    deadline: Deadline,
    command: str,
    progress: Progress,
) -> list[LinkReport]:
    """Each delay in turn, with an equal share of the time that is left; engines in turns within."""
    reports = []
    for index, delay in enumerate(delays):
        share = Deadline(deadline.left_s / (len(delays) - index))
        with Hosts(num_hosts(engines), parse_delay(delay)) as hosts, hosts.mpi():
            before = hosts.round_trip_s()
            report = compare(engines, workload, share, command, progress=progress, hostfile=hosts.hostfile)
            reports.append(
                LinkReport(
                    delay=delay,
                    how=hosts.how,
                    round_trip_us=(before * 1e6, hosts.round_trip_s() * 1e6),
                    complete=report.complete,
                    repeats_done=report.repeats_done,
                    engines=report.engines,
                )
            )
    return reports
