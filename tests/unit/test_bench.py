"""The numbers of a benchmark, and its report as table, JSON and HTML."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import statistics
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from pt_trtllm.bench.html import render, write_html
from pt_trtllm.bench.machine import ReadBandwidth, hardware, versions
from pt_trtllm.bench.measure import Timeline, token_gaps
from pt_trtllm.bench.numbers import Spread, percentile, ratio
from pt_trtllm.bench.own_engine import peak_rss_bytes
from pt_trtllm.bench.report import DecodeBandwidth, EngineReport, LinkReport, Report
from pt_trtllm.bench.shapes import SHAPES, ShapeOptions, make_engines
from pt_trtllm.bench.steps import Bar, StepTimes
from pt_trtllm.bench.table import link_table, rows, text_table, with_ratios
from pt_trtllm.bench.traffic import kv_bytes_per_step, num_parameters, weight_bytes_per_step
from pt_trtllm.bench.workload import Deadline, TimeUp, Workload, fitting
from pt_trtllm.cli.bench import engine_names
from pt_trtllm.cli.main import cli
from pt_trtllm.engine.bundle import BuildLimits, open_bundle
from pt_trtllm.errors import ConfigError, PtError
from pt_trtllm.processes import is_running

pytestmark = pytest.mark.unit


def spread(value: float, num_samples: int = 6) -> Spread:
    return Spread.of([value, value], [value] * num_samples)


def engine(name: str, speed: float, fusions: int, reduces: int) -> EngineReport:
    counts = {"track_fusion": fusions, "tensor_parallel": reduces, "logits": 1}
    reads = DecodeBandwidth(weight_bytes_per_step=10, kv_bytes_per_step=2, gb_per_s=speed, share_of_machine=0.25)
    return EngineReport(
        name=name,
        world_size=2,
        num_tracks=2 if fusions else 1,
        num_layers=8,
        sync_interval=4,
        dtype="bfloat16",
        quantization="none",
        parameters=1000,
        engine_bytes=2000,
        load_s=1.0,
        ttft_ms={"32": spread(10 / speed), "128": spread(20 / speed)},
        tpot_ms={"1": spread(4 / speed), "8": spread(8 / speed)},
        prefill_tflop_per_s={"32": speed},
        decode_tokens_per_s={"1": 250 * speed},
        own_work_us={"prefill": 300.0, "decode/1": 120.0},
        decode_steps={
            "1": StepTimes(
                num_steps=3,
                step_ms=spread(4),
                own_work_us=spread(90),
                kernel_share=0.5,
                collective_share=0.2,
                other_share=0.3,
                kernel_calls=60,
            )
        },
        timeline={
            f"rank {rank}": (
                Bar(name="forward", start=10, duration=3000),
                Bar(name="track_fusion", start=50, duration=9),
            )
            for rank in range(2)
        },
        tokens_per_s=Spread.of([100 * speed] * 2),
        requests_per_s=Spread.of([5 * speed] * 2),
        mix_ttft_ms=spread(9),
        mix_latency_ms=None,
        forward_passes=77,
        collectives_per_pass=counts,
        collectives_planned=counts,
        collective_share={"prefill": 0.1, "decode/1": 0.5},
        peak_rss_mb=[100.0, 120.0],
        decode_bandwidth={"1": reads},
        machine_read_gb_per_s=spread(20),
    )


@pytest.fixture
def report() -> Report:
    return with_ratios(
        Report(
            command="pt-trtllm bench --engine-dir '<a & b>'",
            date="2026-01-02 03:04",
            seconds=12.0,
            complete=False,
            repeats_done=2,
            hardware=hardware(),
            versions=versions(),
            load_average=(0.5, 1.5),
            workload={"repeats": 5, "prompt_lengths": (32, 128)},
            engines=(engine("PT <D=4>", 1.0, 2, 0), engine("TP", 0.5, 0, 16)),
        )
    )


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), rel=1e-9, abs=1e-6)


def test_a_spread_takes_its_median_from_repeats_and_percentiles_from_samples() -> None:
    found = Spread.of([3.0, 1.0, 2.0], [float(i) for i in range(101)], scale=10)
    assert (found.median, found.p50, found.p90, found.p99) == (20, 500, 900, 990)
    assert (found.num_samples, found.num_repeats) == (101, 3)
    assert Spread.of([1.0, 3.0]).p50 == statistics.median([1.0, 3.0])


def test_ratios_to_nothing_are_nothing() -> None:
    assert ratio(3.0, 2.0) == 1.5
    assert (ratio(None, 2.0), ratio(3.0, None), ratio(3.0, 0.0)) == (None, None, None)


def test_gaps_between_tokens_count_only_while_all_decode() -> None:
    early = Timeline(0.0, (1.0, 2.0, 5.0, 6.0, 7.0))
    late = Timeline(0.0, (5.0, 6.0, 7.0, 8.0))
    assert token_gaps([early, late]) == [1.0, 1.0, 1.0, 1.0]  # not the 3 s in which the late one's prompt was computed
    assert token_gaps([Timeline(0.0, (1.0, 3.0)), Timeline(0.0, (4.0, 5.0))]) == [2.0, 1.0]


def test_every_engine_is_compared_to_the_first(report: Report) -> None:
    first, second = report.engines
    assert set(first.ratios.values()) == {1.0}
    assert second.ratios["tpot_ms/1"] == 2.0
    assert second.ratios["tokens_per_s"] == 0.5
    assert second.ratios["layer_syncs"] == 8.0  # 2L against L/D
    assert "forward_passes" not in second.ratios


def test_the_table_shows_every_row_and_says_when_time_was_up(report: Report) -> None:
    text = text_table(report)
    for row in rows(report.engines):
        assert row.label in text
    assert "8.00 (2.00x)" in text
    assert "medians over 2 of 5 repeats" in text
    assert "the time was up" in text


def test_links_stand_side_by_side_each_compared_to_its_own_first_engine(report: Report) -> None:
    link = LinkReport(
        delay="50us", how="netem", round_trip_us=(120.0, 130.0), complete=False, repeats_done=1,
        engines=(engine("PT <D=4>", 0.5, 2, 0), engine("TP", 0.1, 0, 16)),
    )  # fmt: skip
    head, *lines = link_table(dataclasses.replace(report, links=(link,)))
    about = "50us (netem; round trip 120, 130 us), 1 repeats"
    assert [line[:2] for line in lines] == [
        ["shared memory", "PT <D=4>"], ["shared memory", "TP"], [about, "PT <D=4>"], [about, "TP"]
    ]  # fmt: skip
    column = head.index("per token, batch 1, ms")
    assert [line[column] for line in lines] == ["4.00", "8.00 (2.00x)", "8.00", "40.00 (5.00x)"]
    assert "Over slower links" in render(dataclasses.replace(report, links=(link,)))


def test_json_holds_what_was_measured(report: Report, tmp_path: Path) -> None:
    report.write_json(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["engines"][1]["tpot_ms"]["8"] == {
        "median": 16, "p50": 16, "p90": 16, "p99": 16, "num_samples": 6, "num_repeats": 2
    }  # fmt: skip
    assert data["engines"][1]["ratios"]["ttft_ms/32"] == 2.0
    assert data["complete"] is False


class _Page(HTMLParser):
    """Checks that tags nest, and collects them and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_is_one_well_formed_file_that_loads_nothing(report: Report, tmp_path: Path) -> None:
    write_html(report, tmp_path / "report.html")
    source = (tmp_path / "report.html").read_text()
    page = _Page()
    page.feed(source)
    page.close()
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "object", "use", "image"} & set(page.tags)
    assert not {"src", "href", "xlink:href", "data", "srcset"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?:|//|@import|url\(", source)
    assert page.tags.count("svg") == 7 + 2  # charts, and a timeline per engine
    assert source.count('class="t-fusion"') == 2 * 2
    assert "prefers-color-scheme: dark" in source
    assert "PT <D=4>" in page.text
    assert report.command in page.text
    for row in rows(report.engines):
        assert row.label in page.text
    for word in (report.versions["torch"], report.hardware["processor"], "track_fusion 2, tensor_parallel 0"):
        assert word in page.text


def test_html_of_engines_without_some_measures_still_renders(report: Report) -> None:
    empty = dataclasses.replace(report.engines[1], ttft_ms={}, tpot_ms={}, decode_bandwidth={}, peak_rss_mb=[])
    assert "<svg" in render(dataclasses.replace(report, engines=(report.engines[0], empty)))


def test_the_workload_fits_the_smallest_engine_unless_told_otherwise() -> None:
    small = BuildLimits(max_batch_size=4, max_seq_len=64, max_input_len=40)
    large = BuildLimits(max_batch_size=16, max_seq_len=4096, max_input_len=4095)
    workload = fitting([large, small], None, batch_size=None, output_len=None)
    assert (workload.batch_size, workload.prompt_lengths, workload.longest_sequence) == (4, (32,), 64)
    with pytest.raises(ConfigError, match="prompts of up to 128, but the engines allow 40"):
        fitting([large, small], (128,), batch_size=8)
    with pytest.raises(ConfigError, match="output_len is 1, expected at least 2"):
        fitting([], None, output_len=1)


def test_prompts_depend_on_seed_and_key_only() -> None:
    load = Workload()
    assert load.prompt(20, 97, 1) == load.prompt(20, 97, 1) != load.prompt(20, 97, 2)
    assert load.mix() == Workload().mix() != Workload(seed=1).mix()
    assert all(prompt + answer <= load.longest_sequence for prompt, answer in load.mix())


def test_a_deadline_interrupts_what_blocks_and_restores_the_alarm() -> None:
    """Handler and timer: a time limit of the test itself is one."""
    other = signal.setitimer(signal.ITIMER_REAL, 3600.0, 7200.0)
    before = signal.getsignal(signal.SIGALRM)
    deadline = Deadline(0.05)
    try:
        with pytest.raises(TimeUp), deadline.enforced():
            time.sleep(60)
        assert signal.getsignal(signal.SIGALRM) == before
        left_s, interval_s = signal.getitimer(signal.ITIMER_REAL)
        assert 0 < left_s < 3600
        assert interval_s == 7200
    finally:
        signal.setitimer(signal.ITIMER_REAL, *other)
    with pytest.raises(TimeUp):
        deadline.check()


def test_the_machine_reads_memory_and_its_processes_end() -> None:
    with ReadBandwidth(2, num_bytes=1 << 20) as reading:
        pids = [process.pid for process in reading._processes]
        assert reading.measure() > 0
        assert reading.measure() > 0
    assert not any(is_running(pid) for pid in pids)


def test_peak_memory_of_a_process_that_is_not_here_is_unknown(tmp_path: Path) -> None:
    status = tmp_path / "rank0.status"
    assert peak_rss_bytes(status) == 0
    status.write_text(json.dumps({"pid": os.getpid()}))
    assert peak_rss_bytes(status) > 0


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_pt_and_tp_of_a_shape_are_equally_large(name: str, world_size: int) -> None:
    shape = SHAPES[name]
    options = ShapeOptions(shape=shape, models=("pt", "tp", "one"), world_size=world_size)
    pt, tp, one = (checkpoint.model for checkpoint in options.checkpoints().values())
    assert one == tp
    # Norms are the exception: every track has its own.
    norms = 2 * shape.num_layers * shape.hidden_size * (world_size - 1)
    assert num_parameters(pt) - num_parameters(tp) == norms
    assert norms < num_parameters(tp) / 10


def test_a_decode_step_reads_every_weight_once_and_the_past(tmp_path: Path) -> None:
    limits = BuildLimits(max_batch_size=2, max_seq_len=64)
    options = ShapeOptions(shape=SHAPES["tiny"], world_size=2, dtype="float32")
    for name, folder in make_engines(options, limits, tmp_path):
        config, _ = open_bundle(folder)
        model = config.checkpoint.model
        repeated = 64 * 4  # the last norm, on both ranks
        tp_norms = 0 if model.num_tracks > 1 else 2 * 8 * 64 * 4
        assert weight_bytes_per_step(folder, config, 1) == num_parameters(model) * 4 + repeated + tp_norms, name
        assert kv_bytes_per_step(config, 2, 10.0) == 2 * 2 * 8 * 10 * 8 * 16 * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine0", "engine1"]


def test_a_shape_that_cannot_be_made_in_time_leaves_nothing_behind(tmp_path: Path) -> None:
    def late(done: int, total: int) -> None:
        raise TimeUp

    with pytest.raises(TimeUp):
        make_engines(ShapeOptions(shape=SHAPES["tiny"]), BuildLimits(max_seq_len=64), tmp_path, late)
    assert not any(tmp_path.rglob("*.engine"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "give either --engine-dir or --shape"),
        (("--shape", "tiny", "--world-size", "1"), "world_size is 1, expected at least 2"),
        (("--shape", "tiny", "--world-size", "3"), "cannot be divided into 3 tracks: 8 attention heads"),
        (("--shape", "tiny", "--sync-interval", "3"), "sync_interval 3 does not divide num_hidden_layers 8"),
        (("--engine-dir", ".", "--world-size", "2"), "--world-size belong to --shape"),
        (("--shape", "tiny", "--json", "/no/such/folder/x.json"), "the folder /no/such/folder does not exist"),
        (("--shape", "tiny", "--max-seconds", "0"), "max_seconds is 0.0"),
        (("--shape", "tiny", "--repeats", "0"), "repeats is 0, expected at least 1"),
        (
            ("--shape", "tiny", "--models", "pt,llama"),
            "models are ['pt', 'llama'], expected some of ['pt', 'tp', 'one']",
        ),
        (("--shape", "tiny", "--link-delay", "50"), "--link-delay is '50', expected a number with us or ms"),
        (("--shape", "tiny", "--quantization", "none,int2"), "quantization is 'int2'"),
        (("--shape", "tiny", "--quantization", "fp8"), "the CPU engine widens fp8 weights"),
        (("--shape", "tiny", "--quantization", "int4_wo"), "use --group-size 32"),
        (("--shape", "tiny", "--trace", "/no/such/folder/x.json"), "the folder /no/such/folder does not exist"),
    ],
)
def test_bench_refuses_what_it_cannot_measure(args: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(cli, ["bench", *args])
    assert isinstance(result.exception, PtError), result.output
    assert message in str(result.exception)


def test_engine_folders_get_different_names_and_wrong_ones_are_named(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a/engine", "b/engine", "c")]
    assert engine_names(folders[1:]) == ["engine", "c"]
    assert engine_names(folders)[:2] == ["a/engine", "b/engine"]
    assert engine_names([folders[2]] * 2) == [f"{tmp_path.name}/c (0)", f"{tmp_path.name}/c (1)"]
    for folder in folders:
        folder.mkdir(parents=True)
    result = CliRunner().invoke(cli, ["bench", "--engine-dir", *map(str, folders)])
    assert f"{folders[0]}: no manifest.json" in str(result.exception)
