"""What a soak found, and what of it must not be."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pt_trtllm.testing.soak.faults import Fault
from pt_trtllm.testing.soak.requests import CORE, ENSEMBLE, Ending

Report = dict[str, Any]
TOLERATED_DESCRIPTORS = 4
"""A connection that a library keeps open, or that the kernel has not closed yet."""
LOG_LINE = re.compile(r'\\?"event\\?": \\?"answer\\?", \\?"request_id\\?": \\?"(.*?)\\?"')


def judge(report: Report) -> list[str]:
    """What must hold and does not."""
    checks = {
        "a request did not end exactly once": report["wrong"] or report["log"]["requests with two lines"],
        "fewer requests ended than there should be": report["requests"] > sum(report["endings"].values()),
        "an answer has no line in the log": report["log"]["answered without a line"],
        "blocks of the KV cache or requests are left": not all(report["quiet with no KV block in use"]),
        "processes are left": report["processes left"],
        "dead processes are left": report["dead processes that nobody took in"],
        "shared memory is left": report["left in shared memory"],
        "files are left": report["left in the folder of temporary files"],
        "descriptors are left": [
            f"{name}: {first}, then {last}"
            for name, (first, last) in report["descriptors, first and last"].items()
            if last > first + TOLERATED_DESCRIPTORS
        ],
        "a fault was not survived": [name for name, fault in report["faults"].items() if fault["not survived"]],
    }  # fmt: skip
    return [f"{what}: {found}" for what, found in checks.items() if found]


def against_log(endings: list[Ending], log: str) -> dict[str, Any]:
    """The server's own word: an answer that a client saw end has one line, and none has two."""
    lines = Counter(LOG_LINE.findall(log))
    ours = {request_id: count for request_id, count in lines.items() if request_id.startswith("soak-")}
    answered = [e.request_id for e in endings if e.how == "answered" and e.plan.path in (ENSEMBLE, CORE)]
    return {
        "lines": sum(lines.values()),
        "requests with two lines": [request_id for request_id, count in ours.items() if count > 1],
        "answered without a line": [request_id for request_id in answered if request_id not in ours],
    }


def by_kind(faults: Sequence[Fault]) -> dict[str, Any]:
    kinds = sorted({f"{fault.target}, {fault.number.name}" for fault in faults})
    return {kind: _summary([f for f in faults if f"{f.target}, {f.number.name}" == kind]) for kind in kinds}


def _summary(faults: Sequence[Fault]) -> dict[str, Any]:
    outages = [fault.outage_s for fault in faults if fault.outage_s is not None]
    found: dict[str, Any] = {"count": len(faults), "not survived": len(faults) - len(outages)}
    if outages:
        found |= {"median outage s": round(statistics.median(outages), 1), "longest s": round(max(outages), 1)}
    return found
