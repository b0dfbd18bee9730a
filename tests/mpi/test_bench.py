"""`pt-trtllm bench` over real ranks: counts, a whole report, and an end without leftovers. No times are judged."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pt_trtllm.bench.compare import compare
from pt_trtllm.bench.report import DecodeBandwidth, EngineReport, Report
from pt_trtllm.bench.shapes import SHAPES, ShapeOptions, make_engines
from pt_trtllm.bench.steps import StepTimes
from pt_trtllm.bench.workload import Deadline, TimeUp, Workload
from pt_trtllm.processes import is_running
from pt_trtllm.testing.cli import check_cli, run_cli

pytestmark = pytest.mark.mpi

LAYERS = SHAPES["tiny"].num_layers
BACKGROUND = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")
"""As a shell starts them: SIGINT is ignored."""
SMALL = ("--prompt-len", 8, "--prompt-len", 24, "--batch-size", 3, "--output-len", 4, "--num-requests", 4)


def names(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def test_parallel_tracks_meet_every_d_layers_and_tensor_parallelism_twice_in_each(tmp_path: Path) -> None:
    files = ("--json", tmp_path / "report.json", "--html", tmp_path / "report.html", "--trace", tmp_path / "trace.json")
    options = ("--shape", "tiny", "--world_size", 2, "--sync-interval", 4, "--sync-interval", 8, "--repeats", 2)
    done = check_cli("bench", *options, *SMALL, *files, env={"TMPDIR": str(tmp_path)}, timeout_s=600)
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) == names(Report)
    assert (report["complete"], report["repeats_done"]) == (True, 2)
    assert [engine["name"] for engine in report["engines"]] == ["PT D=4", "PT D=8", "TP"]
    expected = {"PT D=4": (LAYERS // 4, 0), "PT D=8": (LAYERS // 8, 0), "TP": (0, 2 * LAYERS)}
    for engine in report["engines"]:
        assert set(engine) == names(EngineReport)
        fusions, reduces = expected[engine["name"]]
        counted = {"track_fusion": fusions, "tensor_parallel": reduces, "logits": 1}
        assert engine["collectives_per_pass"] == engine["collectives_planned"] == counted
        assert set(engine["ttft_ms"]) == {"8", "24"}
        assert set(engine["tpot_ms"]) == set(engine["decode_bandwidth"]) == {"1", "3"}
        assert engine["tpot_ms"]["1"]["num_samples"] == 2 * 3  # gaps between 4 tokens, twice
        assert all(set(reads) == names(DecodeBandwidth) for reads in engine["decode_bandwidth"].values())
        assert all(reads["gb_per_s"] > 0 for reads in engine["decode_bandwidth"].values())
        assert set(engine["own_work_us"]) == set(engine["collective_share"])
        for batch in ("1", "3"):
            steps = engine["decode_steps"][batch]
            assert set(steps) == names(StepTimes)
            assert steps["num_steps"] > 0
            assert steps["kernel_calls"] > fusions + reduces  # one program between two collectives
            shares = [steps[name] for name in ("kernel_share", "collective_share", "other_share")]
            assert sum(shares) == pytest.approx(1)
            assert min(shares) > 0
        assert set(engine["timeline"]) == {"rank 0", "rank 1"}
        for bars in engine["timeline"].values():
            shown = [bar["name"] for bar in bars if bar["name"] in ("track_fusion", "tensor_parallel")]
            assert len(shown) == 3 * (fusions + reduces)
        assert set(engine["collective_share"]) == {"prefill", "decode/1", "decode/3", "mix"}
        assert all(0 < share < 1 for share in engine["collective_share"].values())
        assert len(engine["peak_rss_mb"]) == 2
        assert min(engine["peak_rss_mb"]) > 0
        assert engine["tokens_per_s"]["num_repeats"] == engine["machine_read_gb_per_s"]["num_repeats"] == 2
        assert engine["forward_passes"] > 0
        assert None not in engine.values()
    assert report["engines"][2]["ratios"]["layer_syncs"] == 2 * LAYERS / (LAYERS // 4)
    assert report["command"].startswith("pt-trtllm bench --shape tiny")
    assert "syncs of layers per pass" in done.stdout
    page = (tmp_path / "report.html").read_text()
    assert all(f"<title>{engine['name']}: " in page for engine in report["engines"])
    assert page.count("Decode steps of batch 1, rank by rank") == 1
    assert all(f"<h3>{engine['name']}</h3>" in page for engine in report["engines"])
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    processes = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert processes == [f"{engine['name']} rank {rank}" for engine in report["engines"] for rank in range(2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "trace.json"]


def test_engine_folders_are_measured_and_what_was_measured_in_time_is_reported(tmp_path: Path) -> None:
    workload = Workload(prompt_lengths=(8,), batch_size=2, decode_prompt_len=4, output_len=3, num_requests=2, repeats=3)
    engines = make_engines(ShapeOptions(shape=SHAPES["tiny"]), workload.build_limits(), tmp_path)

    def late(done: int, total: int) -> None:
        if 0 < done < total:
            raise TimeUp

    report = compare(engines, workload, Deadline(600), "here", read_bytes=1 << 20, progress=late)
    assert (report.complete, report.repeats_done) == (False, 1)
    assert [engine.tpot_ms["2"].num_repeats for engine in report.engines] == [1, 1]
    data = tmp_path / "data.json"
    limits = ("--prompt-len", 8, "--output-len", 3, "--num-requests", 2, "--repeats", 1)
    check_cli("bench", "--engine-dir", engines[1][1], *limits, "--json", data, timeout_s=600)
    (only,) = json.loads(data.read_text())["engines"]
    assert (only["name"], only["num_tracks"]) == ("engine1", 1)


def test_too_little_time_is_one_line(tmp_path: Path) -> None:
    done = run_cli("bench", "--shape", "tiny", "--max-seconds", 1e-3, env={"TMPDIR": str(tmp_path)})
    assert done.returncode == 2
    assert "were not enough to make the engines" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("models", "number", "after_s", "prefix"),
    [("pt,tp", signal.SIGTERM, 0, ()), ("pt", signal.SIGINT, 3, ()), ("tp", signal.SIGTERM, 3, BACKGROUND)],
    ids=["SIGTERM while loading", "SIGINT while measuring", "SIGTERM to a background job while measuring"],
)
def test_an_interrupted_run_leaves_no_process_and_no_file(
    tmp_path: Path, models: str, number: int, after_s: int, prefix: tuple[str, ...]
) -> None:
    command = [*prefix, sys.executable, "-m", "pt_trtllm.cli.main", "bench", "--shape", "tiny", *map(str, SMALL)]
    command += ["--models", models]
    num_ranks = 2 * len(models.split(","))
    process = subprocess.Popen(
        [*command, "--repeats", "10000"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        give_up = time.monotonic() + 240
        while len(statuses := list(tmp_path.glob("pt-trtllm-*/rank*.status"))) < num_ranks:
            assert time.monotonic() < give_up, "the ranks did not start"
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.1)
        pids = [json.loads(path.read_text())["pid"] for path in statuses]
        time.sleep(after_s)  # whatever it does by then, it ends in the same way
        process.send_signal(number)
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out, err.strip()) == (130, "", "")
    assert not any(is_running(pid) for pid in pids)
    assert list(tmp_path.iterdir()) == []
