"""`pt-trtllm bench --vllm` with the real vLLM: counts and a whole report. No times are judged."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from pt_trtllm.bench.shapes import SHAPES
from pt_trtllm.bench.vllm.report import SideReport, VllmReport
from pt_trtllm.testing.cli import check_cli

pytestmark = pytest.mark.vllm

LAYERS = SHAPES["small"].num_layers


def names(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


@pytest.mark.timeout(900)
def test_tracks_meet_every_d_layers_in_vllm_and_a_llama_twice_in_each(tmp_path: Path) -> None:
    """Heads of `tiny` are too small for vLLM's attention. Over a link, too, where namespaces can be made."""
    few = ("--prompt-len", 8, "--prompt-len", 24, "--batch-size", 3, "--output-len", 4, "--num-requests", 4)
    links = ("--link-delay", "50us") if os.geteuid() == 0 else ()
    short = tempfile.TemporaryDirectory(prefix="pt-")  # names of vLLM's sockets may have a hundred characters
    done = check_cli(
        "bench", "--vllm", sys.executable, "--vllm-eager", "--sync-interval", 4, *few, "--repeats", 1, *links,
        "--json", tmp_path / "report.json", env={"TMPDIR": short.name}, timeout_s=850,
    )  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) == names(VllmReport)
    assert (report["complete"], report["repeats_done"], report["compiled"]) == (True, 1, False)
    # vLLM sums the shards of a Llama's embedding, too.
    expected = {
        ("vLLM", "Llama"): 2 * LAYERS + 1, ("vLLM", "PT D=4"): LAYERS // 4,
        ("pt-trtllm", "Llama"): 2 * LAYERS, ("pt-trtllm", "PT D=4"): LAYERS // 4,
    }  # fmt: skip
    for engines in (report["engines"], *(link["engines"] for link in report["links"])):
        assert {(engine["software"], engine["model"]): engine["all_reduces"] for engine in engines} == expected
        for engine in engines:
            assert set(engine) == names(SideReport)
            assert (engine["gathers"], set(engine["ttft_ms"]), set(engine["tpot_ms"])) == (1, {"8", "24"}, {"1", "3"})
            assert engine["tpot_ms"]["1"]["num_samples"] == 3  # gaps between 4 tokens
            assert engine["tokens_per_s"]["median"] > 0
    assert len(report["links"]) == len(links) // 2
    assert "the paper (GPUs)" in done.stdout
    assert [path.name for path in Path(short.name).iterdir()] == []
    short.cleanup()
