"""The report as text: all engines side by side, each compared to the Llama in the same software; links; the paper."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pt_trtllm.bench.numbers import ratio
from pt_trtllm.bench.table import Row, Rows, aligned, cell, machine_line, summary_line
from pt_trtllm.bench.vllm.report import LLAMA, SideReport, VllmReport, llama_of

PAPER = (
    ("ttft_ms/", "first token", "-15 to -30%"),
    ("tpot_ms/", "per token", "-2 to -12%"),
    ("tokens_per_s", "request mix, tokens/s", "up to +31.9%"),
)
"""Rows that the paper says something about, and what: PT against a dense model of equal size, in TensorRT-LLM and vLLM
on GPUs."""
LINK_COLUMNS = ("all_reduces", *(key for key, _, _ in PAPER))


def rows(engines: Sequence[SideReport]) -> list[Row]:
    """Every measure, in the order of the report."""
    table = Rows(engines)
    table.add("load_s", "load, s", lambda e: e.load_s, decimals=1, compared=False)
    table.add("all_reduces", "all-reduces per pass (counted)", lambda e: e.all_reduces, decimals=0)
    table.add("gathers", "gathers of logits per pass", lambda e: e.gathers, decimals=0, compared=False)
    table.add_spreads("ttft_ms", "first token, prompt of {}, ms", lambda e: e.ttft_ms)
    table.add_spreads("tpot_ms", "per token, batch {}, ms", lambda e: e.tpot_ms)
    table.add_spread("tokens_per_s", "request mix, tokens/s", lambda e: e.tokens_per_s)
    table.add_spread("requests_per_s", "request mix, requests/s", lambda e: e.requests_per_s)
    table.add_spread("mix_ttft_ms", "request mix, first token, ms", lambda e: e.mix_ttft_ms)
    table.add_spread("mix_latency_ms", "request mix, whole answer, ms", lambda e: e.mix_latency_ms)
    return table.rows


def with_ratios(engines: Sequence[SideReport]) -> tuple[SideReport, ...]:
    """The same, every engine compared to the Llama in its software."""
    measures, compared = [row for row in rows(engines) if row.compared], []
    for index, engine in enumerate(engines):
        found = {row.key: ratio(row.values[index], row.values[llama_of(engines, index)]) for row in measures}
        known = {key: value for key, value in found.items() if value is not None}
        compared.append(dataclasses.replace(engine, ratios=known))
    return tuple(compared)


def cells(row: Row, engines: Sequence[SideReport]) -> list[str]:
    return [cell(row, index, llama_of(engines, index)) for index in range(len(engines))]


def engine_line(engine: SideReport) -> str:
    tracks = f"{engine.num_tracks} tracks, D = {engine.sync_interval}" if engine.num_tracks > 1 else "1 track"
    return f"{tracks}, {engine.num_layers} layers, {engine.parameters / 1e6:.1f} million parameters, bfloat16"


def link_table(report: VllmReport) -> list[list[str]]:
    """A heading, then a line per link and engine; ratios are to the Llama in the same software over the same link."""
    links = [("shared memory", report.engines)]
    for link in report.links:
        before, after = link.round_trip_us
        repeats = "" if link.repeats_done == report.workload["repeats"] else f", {link.repeats_done} repeats"
        about = f"{link.delay} ({link.how}; round trip {before:.0f}, {after:.0f} us){repeats}"
        links.append((about, link.engines))
    columns = [row for row in rows(report.engines) if row.key.startswith(LINK_COLUMNS)]
    lines = [["link", "engine", *(column.label for column in columns)]]
    for about, engines in links:
        found = {row.key: cells(row, engines) for row in rows(engines)}
        for index, engine in enumerate(engines):
            lines.append([about, engine.name, *(found[c.key][index] if c.key in found else "-" for c in columns)])
    return lines


def paper_table(report: VllmReport) -> list[list[str]]:
    """What PT changes against the Llama in the same software, beside what the paper found."""
    lines = [["PT against a Llama of equal size", *(label for _, label, _ in PAPER)]]
    lines.append(["the paper (GPUs)", *(claim for _, _, claim in PAPER)])
    links = [("shared memory", report.engines), *((link.delay, link.engines) for link in report.links)]
    for about, engines in links:
        for engine in engines:
            if engine.model != LLAMA:
                lines.append([f"{engine.name}, {about}", *(change(engine, key) for key, _, _ in PAPER)])
    return lines


def change(engine: SideReport, prefix: str) -> str:
    """In percent, from the least to the largest over all rows of a kind."""
    found = sorted(100 * (value - 1) for key, value in engine.ratios.items() if key.startswith(prefix))
    if not found:
        return "-"
    ends = dict.fromkeys(f"{value:+.0f}%" for value in (found[0], found[-1]))
    return " to ".join(ends)


def text_table(report: VllmReport) -> str:
    measures, names = rows(report.engines), [engine.name for engine in report.engines]
    spread = [row for row in measures if any(" / " in note for note in row.notes)]
    return "\n".join(
        [
            machine_line(report),
            ", ".join(f"{name} {version}" for name, version in report.versions.items()),
            f"vLLM: {'compiled' if report.compiled else 'eager'}; "
            f"{report.vllm_arguments['tensor_parallel_size']} ranks each",
            "",
            *(f"{engine.name}: {engine_line(engine)}" for engine in report.engines),
            "",
            *aligned([["", *names], *([row.label, *cells(row, report.engines)] for row in measures)]),
            "",
            *aligned([["p50 / p90 / p99", *names], *([row.label, *row.notes] for row in spread)]),
            "",
            *([*aligned(link_table(report)), ""] if report.links else []),
            *aligned(paper_table(report)),
            "",
            summary_line(report),
        ]
    )
