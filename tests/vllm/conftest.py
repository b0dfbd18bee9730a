"""These tests run where vLLM is: `scripts/test_vllm.sh` makes such an environment. Elsewhere they skip."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from pt_trtllm.testing.vllm_engine import VllmEngines

HERE = Path(__file__).parent
IS_THERE = importlib.util.find_spec("vllm") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("vllm")
            if not IS_THERE:
                item.add_marker(pytest.mark.skip("vLLM is not installed here; see scripts/test_vllm.sh"))


@pytest.fixture(scope="session")
def engines() -> Iterator[VllmEngines]:
    with VllmEngines() as engines:
        yield engines
