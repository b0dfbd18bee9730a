"""The shipped example over real ranks, started once for all tests that leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pt_trtllm import LLM
from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.engine.build import BuildOptions, build
from pt_trtllm.engine.bundle import BuildLimits

EXAMPLE = Path(__file__).parents[2] / "examples/tiny-pt"


@pytest.fixture(scope="session")
def example_engines(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """World size -> engine, in float32."""
    folder = tmp_path_factory.mktemp("example")
    limits = BuildLimits(max_batch_size=4, max_seq_len=128)
    for size in (1, 2, 4):
        convert(EXAMPLE, folder / f"checkpoint{size}", ConvertOptions(world_size=size, dtype="float32"))
        build(folder / f"checkpoint{size}", folder / str(size), BuildOptions(limits=limits))
    return {size: folder / str(size) for size in (1, 2, 4)}


@pytest.fixture(scope="session")
def example_llm(example_engines: dict[int, Path]) -> Iterator[LLM]:
    """Two ranks; what its counters say is to be taken as differences."""
    with LLM(example_engines[2]) as running:
        yield running
