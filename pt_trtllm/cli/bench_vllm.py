"""`pt-trtllm bench --vllm`"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pt_trtllm.bench.shapes import SHAPES
from pt_trtllm.bench.vllm.compare import WORKLOAD, compare
from pt_trtllm.bench.vllm.engines import SideOptions
from pt_trtllm.bench.vllm.environment import find_environment
from pt_trtllm.bench.vllm.report import VllmReport
from pt_trtllm.bench.workload import Deadline, fitting
from pt_trtllm.cli.options import progress_bar
from pt_trtllm.errors import ConfigError
from pt_trtllm.testing.hosts import check_available

SHORT = dataclasses.replace(WORKLOAD, output_len=16, num_requests=0, first_tokens=1, repeats=3)
"""For models whose every token takes a tenth of a second."""


def check_alone(others: Mapping[str, Any]) -> None:
    """Raises for what was given and means nothing in vLLM. `others`: option -> its value."""
    given = [name for name, value in others.items() if value]
    if given:
        raise ConfigError(
            f"{', '.join(given)} cannot be combined with --vllm: it makes bfloat16 models of --shape, PT and a Llama"
        )


def bench_in_vllm(
    python: Path, shape: str, world_size: int | None, sync_intervals: Sequence[int], eager: bool,
    asked: Mapping[str, Any], link_delays: Sequence[str], deadline: Deadline, command_line: str,
) -> VllmReport:  # fmt: skip
    """`asked`: of the workload, as `fitting` takes it."""
    options = SideOptions(
        shape=SHAPES[shape],
        world_size=2 if world_size is None else world_size,
        sync_intervals=tuple(sync_intervals) or (4, 8),
        eager=eager,
    )
    workload = fitting([], defaults=SHORT if shape == "large" else WORKLOAD, **asked)
    if link_delays:
        check_available()
    environment = find_environment(python)
    with tempfile.TemporaryDirectory(prefix="pt-bench-vllm-") as folder, progress_bar("measuring") as progress:
        return compare(
            environment, options, workload, deadline, command_line, Path(folder), link_delays=link_delays,
            progress=progress,
        )  # fmt: skip
