"""`pt-trtllm bench`"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from pt_trtllm.bench.compare import compare
from pt_trtllm.bench.html import write_html
from pt_trtllm.bench.links import num_hosts, over_links, parse_delay
from pt_trtllm.bench.shapes import MODELS, SHAPES, ShapeOptions, make_engines
from pt_trtllm.bench.table import text_table
from pt_trtllm.bench.vllm.table import text_table as side_table
from pt_trtllm.bench.workload import PROMPT_LENGTHS, SHORT, Deadline, TimeUp, Workload, fitting
from pt_trtllm.checkpoint.quantize import GROUP_SIZES, Quantization
from pt_trtllm.cli.bench_vllm import bench_in_vllm, check_alone
from pt_trtllm.cli.options import EXISTING_FOLDER, FILE, check_outputs, progress_bar
from pt_trtllm.config import DTYPES
from pt_trtllm.engine.bundle import open_bundle
from pt_trtllm.errors import ConfigError
from pt_trtllm.testing.hosts import check_available

DEFAULTS = Workload()
SHAPE_ONLY = ("models", "world_size", "sync_intervals", "dtype", "quantization", "group_size")
SHORT_SHAPES = ("large",)
NOT_IN_VLLM = ("models", "dtype", "quantization", "group_size")
MAX_SECONDS, MAX_SECONDS_IN_VLLM = 600.0, 900.0
"""vLLM alone takes a minute to start each engine."""


@click.command("bench")
@click.option("--engine-dir", "engine_dirs", multiple=True, type=EXISTING_FOLDER, help="Engine; several may follow.")
@click.argument("more_engine_dirs", nargs=-1, type=EXISTING_FOLDER, metavar="[DIR]...")
@click.option("--shape", type=click.Choice([*SHAPES]), help="Instead: PT and tensor-parallel engines of equal size.")
@click.option("--models", help=f"Of --shape: {', '.join(MODELS)} (one rank), or some of them.  [default: pt,tp]")
@click.option("--world-size", type=int, help="Of --shape: ranks, and tracks.  [default: 2]")
@click.option("--sync-interval", "sync_intervals", type=int, multiple=True, help="Of --shape: D.  [default: 4]")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of --shape.  [default: bfloat16]")
@click.option("--quantization", help="Of --shape: none, int8_wo, int4_wo, or several.  [default: none]")
@click.option("--group-size", type=click.Choice([str(s) for s in GROUP_SIZES]), help="Of int4_wo.  [default: 128]")
@click.option(
    "--prompt-len", "prompt_lengths", type=int, multiple=True,
    help=f"Measure the first token of prompts this long.  [default: {', '.join(map(str, PROMPT_LENGTHS))}]",
)  # fmt: skip
@click.option(
    "--batch-size", "batch_sizes", type=int, multiple=True,
    help=f"Sequences that decode together, beside a single one.  [default: {DEFAULTS.batch_size}]",
)  # fmt: skip
@click.option("--output-len", type=int, help=f"Tokens of an answer.  [default: {DEFAULTS.output_len}]")
@click.option("--num-requests", type=int, help=f"Of the mix; 0 for none.  [default: {DEFAULTS.num_requests}]")
@click.option("--repeats", type=int, help=f"Each measures everything once.  [default: {DEFAULTS.repeats}]")
@click.option("--seed", type=int, default=DEFAULTS.seed, show_default=True, help="Of prompts and lengths.")
@click.option(
    "--max-seconds", type=float,
    help=f"Then report what there is.  [default: {MAX_SECONDS:.0f}; with --vllm {MAX_SECONDS_IN_VLLM:.0f}]",
)  # fmt: skip
@click.option(
    "--link-delay", "link_delays", multiple=True,
    help="Also measure over TCP between network namespaces, each way delayed by this: 50us, 1ms. Needs root.",
)  # fmt: skip
@click.option(
    "--vllm", "vllm_python", type=click.Path(path_type=Path), metavar="PYTHON",
    help="Measure PT against a Llama in the vLLM of this interpreter's environment, and beside them our own engine.",
)  # fmt: skip
@click.option("--vllm-eager", is_flag=True, help="Of --vllm: without compiling, which starts sooner and runs slower.")
@click.option("--json", "json_file", type=FILE, help="Write everything measured here.")
@click.option("--html", "html_file", type=FILE, help="Write a report with charts and a timeline here.")
@click.option("--trace", "trace_file", type=FILE, help="Write every rank's decode steps here (Chrome trace format).")
def command(
    engine_dirs: tuple[Path, ...], more_engine_dirs: tuple[Path, ...], shape: str | None, json_file: Path | None,
    html_file: Path | None, trace_file: Path | None, max_seconds: float | None, prompt_lengths: tuple[int, ...],
    batch_sizes: tuple[int, ...], output_len: int | None, num_requests: int | None, repeats: int | None, seed: int,
    link_delays: tuple[str, ...], vllm_python: Path | None, vllm_eager: bool, **shape_options: Any,
) -> None:  # fmt: skip
    """Measure engines side by side, against each other and against the machine's memory."""
    limit = MAX_SECONDS if vllm_python is None else MAX_SECONDS_IN_VLLM
    deadline = Deadline(limit if max_seconds is None else max_seconds)
    folders = [*engine_dirs, *more_engine_dirs]
    if vllm_python is None and bool(folders) == bool(shape):
        raise ConfigError("give either --engine-dir or --shape")
    given = [f"--{name.replace('_', '-').rstrip('s')}" for name in SHAPE_ONLY if shape_options[name]]
    if given and vllm_python is None and shape is None:
        raise ConfigError(f"{', '.join(given)} belong to --shape; an engine has them already")
    if vllm_eager and vllm_python is None:
        raise ConfigError("--vllm-eager belongs to --vllm")
    check_outputs({"--json": json_file, "--html": html_file, "--trace": trace_file})
    for delay in link_delays:
        parse_delay(delay)
    asked: dict[str, Any] = {"output_len": output_len, "num_requests": num_requests, "repeats": repeats, "seed": seed}
    asked |= {"prompt_lengths": prompt_lengths or None, "batch_sizes": batch_sizes}
    if vllm_python is not None:
        others = {f"--{name.replace('_', '-')}": shape_options[name] for name in NOT_IN_VLLM}
        check_alone({**others, "an engine folder": folders, "--html": html_file, "--trace": trace_file})
        beside = bench_in_vllm(
            vllm_python, shape or "small", shape_options["world_size"], shape_options["sync_intervals"], vllm_eager,
            asked, link_delays, deadline, _command_line(),
        )  # fmt: skip
        if json_file is not None:
            beside.write_json(json_file)
        click.echo(side_table(beside))
        return
    if link_delays:
        check_available()
    limits = [open_bundle(folder)[0].limits for folder in folders]
    workload = fitting(limits, defaults=SHORT if shape in SHORT_SHAPES else DEFAULTS, **asked)
    with tempfile.TemporaryDirectory(prefix="pt-bench-") as work:
        engines = list(zip(engine_names(folders), folders, strict=True))
        if shape is not None:
            engines = _make(_shape_options(shape, **shape_options), workload, Path(work), deadline)
        if link_delays:
            num_hosts(engines)
        traced = trace_file or (Path(work) / "trace.json" if html_file else None)
        with progress_bar("measuring") as progress:
            # Shared memory is one of the links: all get the same time.
            share = Deadline(deadline.left_s / (1 + len(link_delays)))
            report = compare(engines, workload, share, _command_line(), progress=progress, trace_file=traced)
            links = over_links(engines, workload, link_delays, deadline, _command_line(), progress)
            report = dataclasses.replace(report, links=tuple(links))
    if json_file is not None:
        report.write_json(json_file)
    if html_file is not None:
        write_html(report, html_file)
    click.echo(text_table(report))


def _shape_options(
    shape: str, models: str | None, world_size: int | None, sync_intervals: tuple[int, ...], dtype: str | None,
    quantization: str | None, group_size: str | None,
) -> ShapeOptions:  # fmt: skip
    methods = _words(quantization or "none")
    return ShapeOptions(
        shape=SHAPES[shape],
        models=_words(models) if models is not None else ("pt", "tp"),
        world_size=2 if world_size is None else world_size,
        sync_intervals=sync_intervals or (4,),
        dtype=dtype or "bfloat16",
        quantizations=tuple(Quantization(method=method, group_size=int(group_size or 128)) for method in methods),
    )


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in text.split(",")))


def _make(options: ShapeOptions, workload: Workload, work: Path, deadline: Deadline) -> list[tuple[str, Path]]:
    try:
        with progress_bar("making engines") as progress:

            def tick(done: int, total: int) -> None:
                deadline.check()
                progress(done, total)

            return list(make_engines(options, workload.build_limits(), work, tick))
    except TimeUp:
        raise ConfigError(
            f"{deadline.seconds:.0f} s were not enough to make the engines; give more --max-seconds, or a smaller shape"
        ) from None


def engine_names(folders: list[Path]) -> list[str]:
    """The last part of each path, or the last two where parts repeat; numbered where these do, too."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = ["/".join(folder.resolve().parts[-2:]) for folder in folders]
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names)]


def _command_line() -> str:
    return shlex.join(["pt-trtllm", *sys.argv[1:]])
