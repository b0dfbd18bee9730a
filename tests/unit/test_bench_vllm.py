"""The benchmark in vLLM, as far as no vLLM is needed: models, counts, comparisons, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from pt_trtllm import __version__
from pt_trtllm.bench.numbers import Spread
from pt_trtllm.bench.shapes import SHAPES
from pt_trtllm.bench.traffic import num_parameters
from pt_trtllm.bench.vllm.engines import SideOptions, make_models
from pt_trtllm.bench.vllm.environment import VllmEnvironment, find_environment
from pt_trtllm.bench.vllm.operations import Collectives, collectives
from pt_trtllm.bench.vllm.report import LLAMA, SideLink, SideReport, VllmReport
from pt_trtllm.bench.vllm.table import PAPER, change, link_table, paper_table, rows, text_table, with_ratios
from pt_trtllm.bench.vllm.vllm_engine import VllmEngine
from pt_trtllm.bench.workload import Deadline, Workload, fitting
from pt_trtllm.checkpoint.sources import open_source
from pt_trtllm.cli.main import cli
from pt_trtllm.engine.bundle import open_bundle
from pt_trtllm.errors import CommunicationError, ConfigError, PtError

pytestmark = pytest.mark.unit

TINY = SHAPES["tiny"]
LOAD = Workload(prompt_lengths=(8, 24), batch_size=3, output_len=4, num_requests=4)


def side(software: str, model: str, speed: float, all_reduces: int) -> SideReport:
    return SideReport(
        software=software,
        model=model,
        num_layers=8,
        num_tracks=1 if model == LLAMA else 2,
        sync_interval=8 if model == LLAMA else 4,
        parameters=27_000_000,
        load_s=60.0,
        ttft_ms={"128": Spread.of([100 / speed]), "512": Spread.of([400 / speed**2])},
        tpot_ms={"1": Spread.of([10 / speed] * 3)},
        tokens_per_s=Spread.of([200 * speed]),
        requests_per_s=None,
        mix_ttft_ms=None,
        mix_latency_ms=None,
        all_reduces=all_reduces,
        gathers=1,
    )


@pytest.fixture
def report() -> VllmReport:
    engines = with_ratios(
        [
            side("vLLM", LLAMA, 1.0, 17),
            side("vLLM", "PT D=4", 1.25, 2),
            side("pt-trtllm", LLAMA, 2.0, 16),
            side("pt-trtllm", "PT D=4", 2.0, 2),
        ]
    )
    slow = with_ratios([side("vLLM", LLAMA, 0.1, 17), side("vLLM", "PT D=4", 0.4, 2)])
    link = SideLink(delay="1ms", how="relay", round_trip_us=(2000.0, 2100.0), repeats_done=2, engines=slow)
    return VllmReport(
        command="pt-trtllm bench --vllm python",
        date="2026-01-02 03:04",
        seconds=12.0,
        complete=True,
        repeats_done=3,
        hardware={"processor": "x", "cores": 2, "memory_gib": 1.0, "kernels": "AVX2"},
        versions={"vLLM": "0.32.0"},
        load_average=(0.5, 1.5),
        workload=dataclasses.asdict(dataclasses.replace(LOAD, repeats=3)),
        compiled=True,
        vllm_arguments={"tensor_parallel_size": 2},
        engines=engines,
        links=(link,),
    )


def test_one_checkpoint_of_each_model_is_read_by_its_own_format_and_by_our_engine(tmp_path: Path) -> None:
    models = make_models(SideOptions(shape=TINY), LOAD, tmp_path, lambda: None)
    assert [model.name for model in models] == [LLAMA, "PT D=4", "PT D=8"]
    kinds = [json.loads((model.checkpoint_dir / "config.json").read_text()) for model in models]
    assert [kind["model_type"] for kind in kinds] == ["llama", "parallel_track", "parallel_track"]
    assert [kind["architectures"] for kind in kinds] == [["LlamaForCausalLM"], ["PTForCausalLM"], ["PTForCausalLM"]]
    for model in models:
        assert open_source(model.checkpoint_dir, "auto").config == model.config
        engine, _ = open_bundle(model.engine_dir)
        assert (engine.checkpoint.model, engine.checkpoint.dtype) == (model.config, "bfloat16")
        assert engine.mapping.world_size == 2
    llama, *tracks = (num_parameters(model.config) for model in models)
    norms = 2 * TINY.num_layers * TINY.hidden_size  # of the second track
    assert tracks == [llama + norms] * 2


def test_collectives_are_those_of_every_pass_on_every_rank() -> None:
    shared = {"_C::shm_allreduce": 85, "_C::shm_all_gather": 5, "_C::onednn_mm": 45}
    assert collectives([shared, dict(shared)], 5) == Collectives(all_reduces=17, gathers=1, shared_memory=True)
    # Each shows under several names, and counts once.
    sent = {
        "_c10d_functional::all_reduce_": 10,
        "c10d::allreduce_": 10,
        "gloo:all_reduce": 10,
        "c10d::_allgather_base_": 5,
    }
    assert collectives([sent, sent], 5) == Collectives(all_reduces=2, gathers=1, shared_memory=False)
    with pytest.raises(CommunicationError, match="different collectives"):
        collectives([shared, sent], 5)


def test_each_is_compared_to_the_llama_in_the_same_software(report: VllmReport) -> None:
    assert [engine.ratios["tpot_ms/1"] for engine in report.engines] == [1.0, 0.8, 1.0, 1.0]
    assert report.engines[3].ratios["all_reduces"] == 2 / 16
    assert "load_s" not in report.engines[1].ratios
    head, *lines = link_table(report)
    column = head.index("per token, batch 1, ms")
    assert [line[column] for line in lines] == [
        "10.00",
        "8.00 (0.80x)",
        "5.00",
        "5.00 (1.00x)",
        "100.00",
        "25.00 (0.25x)",
    ]
    assert lines[4][0] == "1ms (relay; round trip 2000, 2100 us), 2 repeats"


def test_the_paper_stands_beside_what_was_measured(report: VllmReport) -> None:
    assert change(report.engines[1], "ttft_ms/") == "-36% to -20%"
    assert change(report.engines[1], "mix_ttft_ms") == "-"
    lines = paper_table(report)
    assert lines[1] == ["the paper (GPUs)", *(claim for _, _, claim in PAPER)]
    assert lines[2:] == [
        ["vLLM: PT D=4, shared memory", "-36% to -20%", "-20%", "+25%"],
        ["pt-trtllm: PT D=4, shared memory", "+0%", "+0%", "+0%"],
        ["vLLM: PT D=4, 1ms", "-94% to -75%", "-75%", "+300%"],
    ]
    text = text_table(report)
    assert all(row.label in text for row in rows(report.engines))
    assert "vLLM: compiled; 2 ranks each" in text


def test_the_cache_holds_the_largest_phase_in_whole_blocks() -> None:
    assert fitting([], (600,), LOAD, num_requests=0).most_cached_tokens == 640
    assert fitting([], (8,), LOAD, batch_sizes=(32, 8), num_requests=0).most_cached_tokens == 32 * 128
    many = fitting([], (100,), LOAD, output_len=40, num_requests=50)
    assert many.most_cached_tokens == sum(-(-(prompt + answer) // 128) * 128 for prompt, answer in many.mix())


def test_batch_sizes_are_measured_beside_a_single_sequence() -> None:
    assert fitting([], None, batch_sizes=(8, 32)).batch_sizes == (1, 8, 32)
    assert fitting([], None, batch_sizes=(1,)).batch_sizes == (1,)
    with pytest.raises(ConfigError, match="batch_size is 0, expected at least 1"):
        fitting([], None, batch_sizes=(0,))
    with pytest.raises(ConfigError, match=r"smaller_batch_sizes are \[0, 1\], expected 1 to 8"):
        fitting([], None, batch_sizes=(0, 8))


def interpreter(folder: Path, packages: tuple[str, ...], entry_point: bool = False, version: str = __version__) -> Path:
    """A Python whose environment holds empty packages of these names, and nothing else."""
    for package in packages:
        (folder / "site" / package).mkdir(parents=True)
        (folder / "site" / package / "__init__.py").touch()
    about = folder / "site" / "pt_trtllm-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: pt-trtllm\nVersion: {version}\n")
    points = "[vllm.general_plugins]\nparallel_track = pt_trtllm.vllm:register\n" if entry_point else ""
    (about / "entry_points.txt").write_text(points)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder / "site"} exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    return python


WORKER = ("vllm", "pt_trtllm/bench/vllm/worker")


@pytest.mark.parametrize(
    ("packages", "entry_point", "version", "message"),
    [
        ((), False, __version__, "whose environment has no vLLM; install it there"),
        (("vllm",), False, __version__, "has vLLM unknown but not the plugin of this package"),
        (("vllm",), True, __version__, "has vLLM unknown but not the plugin of this package"),
        (WORKER, False, __version__, "has vLLM unknown but not the plugin of this package"),
        (WORKER, True, "9.9", f"has pt-trtllm 9.9; this is {__version__}"),
    ],
)
def test_an_environment_that_lacks_something_is_refused_by_name(
    tmp_path: Path, packages: tuple[str, ...], entry_point: bool, version: str, message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        find_environment(interpreter(tmp_path, packages, entry_point, version))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_environment_with_everything_is_found_from_where_the_user_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = interpreter(tmp_path, WORKER, entry_point=True)
    monkeypatch.chdir(tmp_path)
    found = find_environment(python.relative_to(tmp_path))
    assert (found.python, found.vllm_version) == (tmp_path / "python", "unknown")


def test_what_the_caller_has_set_for_vllm_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "3|4")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")
    variables = VllmEnvironment(python=tmp_path / "bin/python", prefix=tmp_path, vllm_version="1").variables("0|1")
    assert variables["VLLM_CPU_OMP_THREADS_BIND"] == "3|4"
    assert "VLLM_CPU_KVCACHE_SPACE" not in variables  # outdoes the size that is asked for
    assert variables["PATH"].startswith(f"{tmp_path}/bin:")


def test_a_vllm_that_does_not_start_is_quoted_and_leaves_no_process(tmp_path: Path) -> None:
    """Our own interpreter: it has the worker, and no vLLM."""
    environment = VllmEnvironment(python=Path(sys.executable), prefix=tmp_path, vllm_version="none")
    with VllmEngine("vLLM: Llama", tmp_path, TINY.config(1, None), 2, LOAD, Deadline(120)) as engine:
        with pytest.raises(CommunicationError, match=r"vLLM: Llama: vLLM ended early; .*No module named 'vllm"):
            engine.start(environment, tmp_path, eager=True)
        processes = list(engine._processes)
    assert all(process.poll() is not None for process in processes)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--vllm", "/no/such/python"), "--vllm is /no/such/python, expected the Python interpreter"),
        (("--vllm", "/bin/false"), "does not answer as a Python interpreter: exit code 1"),
        (("--vllm", sys.executable, "--engine-dir", "."), "an engine folder cannot be combined with --vllm"),
        (("--vllm", sys.executable, "--html", "x.html"), "--html cannot be combined with --vllm"),
        (("--vllm", sys.executable, "--quantization", "int8_wo"), "--quantization cannot be combined with --vllm"),
        (("--vllm", sys.executable, "--world-size", "1"), "world_size is 1, expected at least 2"),
        (("--vllm", sys.executable, "--sync-interval", "3"), "sync_interval 3 does not divide num_hidden_layers 8"),
        (("--vllm", sys.executable, "--repeats", "0"), "repeats is 0, expected at least 1"),
        (("--shape", "tiny", "--vllm-eager"), "--vllm-eager belongs to --vllm"),
    ],
)
def test_bench_in_vllm_refuses_what_it_cannot_measure(args: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(cli, ["bench", *args])
    assert isinstance(result.exception, PtError), result.output
    assert message in str(result.exception)
