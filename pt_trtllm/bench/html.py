"""The report as one HTML file: no scripts, nothing from elsewhere, readable in light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pt_trtllm.bench.report import Report
from pt_trtllm.bench.table import Row, cell, engine_line, link_table, machine_line, rows, summary_line
from pt_trtllm.bench.timeline import STYLE as TIMELINE_STYLE
from pt_trtllm.bench.timeline import timelines
from pt_trtllm.checkpoint.artifact import replace_file

CHARTS = (
    ("Time to the first token, ms", "ttft_ms/"),
    ("Time per token, ms", "tpot_ms/"),
    ("Throughput while decoding, tokens/s", "decode_tokens_per_s/"),
    ("Throughput of the request mix, tokens/s", "tokens_per_s"),
    ("Syncs of layers per pass", "layer_syncs"),
    ("Where decode steps spend their time, %", "step/"),
    ("Reads while decoding, GB/s", "decode_gb_per_s/"),
)
NUM_COLORS = 6
WIDTH, LABEL_WIDTH, VALUE_WIDTH, BAR, GAP = 860, 390, 90, 16, 10

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --back: #ffffff; --soft: #5b6570; --line: #d5dae0;
  --c0: #2563a8; --c1: #c05a14; --c2: #2c7a4b; --c3: #8a4fa3; --c4: #a3283f; --c5: #6b6b2f; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ec; --back: #15181c; --soft: #9aa5b1; --line: #363d45;
  --c0: #6ea8e8; --c1: #f0965a; --c2: #6cc58f; --c3: #c596dc; --c4: #ee7f92; --c5: #c4c474; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 72rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; } .soft { color: var(--soft); }
table { border-collapse: collapse; } th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); }
td { font-variant-numeric: tabular-nums; } th { text-align: left; } .number { text-align: right; }
small { display: block; color: var(--soft); } code { overflow-wrap: anywhere; }
svg { max-width: 100%; height: auto; } svg text { font: 13px system-ui, sans-serif; fill: var(--text); }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .4em; }
""" + "".join(f".c{i} {{ fill: var(--c{i}); background: var(--c{i}); }}\n" for i in range(NUM_COLORS))


def write_html(report: Report, target: Path) -> None:
    with replace_file(target) as path:
        path.write_text(render(report), encoding="utf-8")


def render(report: Report) -> str:
    names = [engine.name for engine in report.engines]
    measures = rows(report.engines)
    parts = [
        "<h1>pt-trtllm bench</h1>",
        f'<p class="soft">{escape(report.date)} UTC; {escape(summary_line(report))}</p>',
        f"<p><code>{escape(report.command)}</code></p>",
        "<h2>Engines</h2>",
        _legend([f"{engine.name}: {engine_line(engine)}" for engine in report.engines]),
        "<h2>Measured</h2>",
        _measures(measures, names),
        '<p class="soft">Medians over the repeats; in brackets the ratio to the first engine; below, p50 / p90 / p99 '
        "of every sample. Engines were measured in turns.</p>",
    ]
    for title, prefix in CHARTS:
        chosen = [row for row in measures if row.key.startswith(prefix)]
        if chosen:
            parts += [f"<h2>{escape(title)}</h2>", _chart(title, chosen, names)]
    if report.links:
        head, *lines = link_table(report)
        parts += [
            "<h2>Over slower links</h2>",
            _table(head, lines),
            '<p class="soft">One rank in each network namespace, MPI over TCP; delays are one way. In brackets the '
            "ratio to the first engine over the same link.</p>",
        ]
    parts += [
        timelines(report.engines),
        "<h2>Collectives: counted and planned</h2>",
        _table(
            ["engine", "counted per pass", "planned per pass"],
            [[e.name, _words(e.collectives_per_pass), _words(e.collectives_planned)] for e in report.engines],
        ),
        "<h2>Machine and versions</h2>",
        f"<p>{escape(machine_line(report))}</p>",
        _table(["", ""], [[name, _text(value)] for name, value in {**report.hardware, **report.versions}.items()]),
        "<h2>Workload</h2>",
        _table(["", ""], [[name, _text(value)] for name, value in report.workload.items()]),
        "<h2>Memory and reading</h2>",
        _table(
            ["engine", "peak memory per rank, MB", "batch", "weights per step, MB", "keys and values, MB"],
            [
                [
                    e.name,
                    ", ".join(f"{size:.0f}" for size in e.peak_rss_mb),
                    batch,
                    f"{reads.weight_bytes_per_step / 1e6:.2f}",
                    f"{reads.kv_bytes_per_step / 1e6:.2f}",
                ]
                for e in report.engines
                for batch, reads in e.decode_bandwidth.items()
            ],
        ),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>pt-trtllm bench: {escape(', '.join(names))}</title><style>{STYLE}{TIMELINE_STYLE}</style></head>\n"
        "<body>" + "\n".join(parts) + "</body></html>\n"
    )


def _measures(measures: Iterable[Row], names: Sequence[str]) -> str:
    lines = []
    for row in measures:
        cells = "".join(
            f'<td class="number">{escape(cell(row, i))}{f"<small>{escape(note)}</small>" if note else ""}</td>'
            for i, note in enumerate(row.notes)
        )
        lines.append(f'<tr><th scope="row">{escape(row.label)}</th>{cells}</tr>')
    head = "".join(f'<th scope="col" class="number">{escape(name)}</th>' for name in names)
    return f'<div class="wide"><table><tr><th></th>{head}</tr>{"".join(lines)}</table></div>'


def _chart(title: str, chosen: Sequence[Row], names: Sequence[str]) -> str:
    """Horizontal bars, one group per row, one bar per engine, all on one scale from 0."""
    largest = max((value for row in chosen for value in row.values if value is not None), default=0.0) or 1.0
    room = WIDTH - LABEL_WIDTH - VALUE_WIDTH
    y, shapes = GAP, []
    for row in chosen:
        middle = y + BAR * len(names) / 2 + 4
        shapes.append(f'<text x="{LABEL_WIDTH - 8}" y="{middle:.0f}" text-anchor="end">{escape(row.label)}</text>')
        for index, (name, value) in enumerate(zip(names, row.values, strict=True)):
            if value is not None:
                width = max(1.0, room * value / largest)
                shapes.append(
                    f'<rect class="c{index % NUM_COLORS}" x="{LABEL_WIDTH}" y="{y}" width="{width:.1f}" '
                    f'height="{BAR - 2}"><title>{escape(name)}: {value:,.{row.decimals}f}</title></rect>'
                    f'<text x="{LABEL_WIDTH + width + 6:.1f}" y="{y + BAR - 4}">{value:,.{row.decimals}f}</text>'
                )
            y += BAR
        y += GAP
    return (
        f'<div class="wide"><svg viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" role="img" '
        f'aria-label="{escape(title)}">{"".join(shapes)}</svg></div>{_legend(names)}'
    )


def _legend(labels: Sequence[str]) -> str:
    items = (f'<span class="swatch c{i % NUM_COLORS}"></span>{escape(label)}' for i, label in enumerate(labels))
    return f"<p>{'<br>'.join(items)}</p>"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in line)}</tr>" for line in lines)
    return f'<div class="wide"><table>{f"<tr>{top}</tr>" if any(head) else ""}{body}</table></div>'


def _words(counts: dict[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in counts.items())


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
