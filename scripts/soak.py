#!/usr/bin/env python3
"""Many mixed requests, many of them left, while ranks and model processes are killed and stopped.

Usage: scripts/soak.py [--requests N] [--clients N] [--cancelled SHARE] [--faults N] [--seed N]
       [--max-seconds S] [--json FILE]

The example model over two ranks, behind `pt-trtllm serve` and `pt-trtllm openai`; a server that ends is started again,
as an init system would. Half of the faults hit ranks and model processes alike; the rest, in a second part, only
ranks, so that the server's own processes live through it, and what they hold first and last can be compared.
Exits with 1 where anything that must hold does not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pt_trtllm.engine.bundle import BuildLimits
from pt_trtllm.processes import is_running, parent, state
from pt_trtllm.runtime.tokenizer import Tokenizer
from pt_trtllm.serving.repository import DeployOptions
from pt_trtllm.testing.soak.clients import SoakClient
from pt_trtllm.testing.soak.faults import MODEL, RANK, Fault, draw_faults, inject
from pt_trtllm.testing.soak.leftovers import describe, descriptors, resident_mib, shared_memory
from pt_trtllm.testing.soak.load import Load
from pt_trtllm.testing.soak.report import Report, against_log, by_kind, judge
from pt_trtllm.testing.soak.requests import PATHS, Ending, draw_plans
from pt_trtllm.testing.soak.service import KeptService
from pt_trtllm.testing.triton import EXAMPLE, make_repository, wait_until_quiet

LIMITS = BuildLimits(max_batch_size=32, max_seq_len=512, max_num_tokens=256)
QUIET_S = 120.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--cancelled", type=float, default=0.2)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-seconds", type=float, default=3000.0, help="no request is begun after so long")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    before = shared_memory()
    with tempfile.TemporaryDirectory(prefix="pt-soak-") as folder, _temporary_files_in(Path(folder)) as temporary:
        report = soak(given, Path(folder))
        report["left in the folder of temporary files"] = sorted(path.name for path in temporary.iterdir())
    report["left in shared memory"] = sorted(shared_memory() - before)
    problems = judge(report)
    print(json.dumps(report, indent=2))
    if given.json:
        given.json.write_text(json.dumps(report, indent=2) + "\n")
    print("\n".join(problems) or "everything held", file=sys.stderr)
    return 1 if problems else 0


def soak(given: argparse.Namespace, folder: Path) -> Report:
    options = DeployOptions(max_queue_size=128, max_tokens_in_paged_kv_cache=8192)
    repository = make_repository(folder, world_size=2, limits=LIMITS, options=options)
    tokenizer, rng = Tokenizer(EXAMPLE), random.Random(given.seed)
    plans = draw_plans(given.cancelled, given.seed)
    started, endings, faults, refusals, seen = time.monotonic(), list[Ending](), list[Fault](), 0, set[int]()
    give_up = started + given.max_seconds
    with KeptService(repository, EXAMPLE, folder) as service:

        def part(count: int, targets: tuple[str, ...], num_faults: int) -> None:
            nonlocal refusals
            load = Load(
                plans,
                lambda: SoakClient(service, tokenizer),
                given.clients,
                at_least=count,
                end_s=give_up - time.monotonic(),
            )
            for target, number in draw_faults(num_faults, targets, rng):
                seen.update(service.processes())
                if (fault := inject(service, load, target, number, rng)) is not None:
                    faults.append(fault)
            load.finish()
            endings.extend(load.endings)
            refusals += load.num_refusals

        part(given.requests // 2, (RANK, MODEL), given.faults // 2)
        part(min(200, given.requests // 10), (), 0)  # the server that came last is warm
        quiet = [becomes_quiet(service)]
        first, first_mib = descriptors(service.processes()), resident_mib(service.processes())
        part(given.requests - len(endings), (RANK,), given.faults - given.faults // 2)
        quiet.append(becomes_quiet(service))
        last, last_mib = descriptors(service.processes()), resident_mib(service.processes())
        names = {pid: describe(pid) for pid in first.keys() & last.keys()}
        seen.update(service.processes())
        zombies = sorted(f"child of {describe(parent(pid))}" for pid in service.processes() if state(pid) == "Z")
        log = service.log_file.read_text(errors="replace")
    return {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "seconds": round(time.monotonic() - started),
        "requests": given.requests,
        "clients": given.clients,
        "endings": Counter(ending.how for ending in endings),
        "endings by path": {
            path: Counter(e.how for e in endings if e.plan.path == path) for path, _ in PATHS
        },
        "sent again after a refusal": refusals,
        "errors": Counter(re.sub(r"[0-9]+", "#", e.text)[:160] for e in endings if e.how == "failed").most_common(20),
        "wrong": [f"{e.request_id}: {e.text}" for e in endings if e.how == "wrong"][:20],
        "log": against_log(endings, log),
        "faults": by_kind(faults),
        "server starts": service.num_starts,
        "starts that failed": service.failed_starts,
        "quiet with no KV block in use": quiet,
        "descriptors, first and last": {f"{names[pid]} ({pid})": [first[pid], last[pid]] for pid in sorted(names)},
        "MiB, first and last": {f"{names[p]} ({p})": [round(first_mib[p]), round(last_mib[p])] for p in sorted(names)},
        "dead processes that nobody took in": zombies,
        "processes left": sorted(pid for pid in seen if is_running(pid)),
    }  # fmt: skip


def becomes_quiet(service: KeptService) -> bool:
    try:
        wait_until_quiet(service, "nothing runs", QUIET_S)
    except AssertionError:
        return False
    return True


def processor() -> str:
    match = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)
    return match[1] if match else platform.processor()


@contextlib.contextmanager
def _temporary_files_in(folder: Path) -> Iterator[Path]:
    """Everything started here puts its temporary files below a folder of its own."""
    place = folder / "t"
    place.mkdir()
    os.environ["TMPDIR"], tempfile.tempdir = str(place), None
    yield place


if __name__ == "__main__":
    sys.exit(main())
