"""A few decode steps of every rank as coloured bars: all engines on one scale, so that lengths compare."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from pt_trtllm.bench.report import EngineReport

WIDTH, LABEL_WIDTH, LANE, GAP = 1060, 120, 26, 14
KINDS = {
    "forward": ("compute", "compute"),
    "track_fusion": ("fusion", "track fusion"),
    "tensor_parallel": ("reduce", "tensor-parallel all-reduce"),
    "logits": ("gather", "gather of logits"),
    "broadcast": ("wait", "broadcast: rank 0 tells the step, the others wait for it"),
    "schedule": ("own", "rank 0 alone: schedule, sample, report"),
    "draft": ("own", ""),
    "sample": ("own", ""),
    "report": ("own", ""),
    "messages": ("own", ""),
}
"""Name of a span -> its colour, and the legend's words."""
STYLE = """
:root { --t-compute: #4f86c6; --t-fusion: #d9480f; --t-reduce: #b02a6b; --t-gather: #8a6d00; --t-wait: #d3d9df;
  --t-own: #2f9e63; }
@media (prefers-color-scheme: dark) { :root { --t-compute: #3f6ea6; --t-fusion: #ff8a4c; --t-reduce: #f06fae;
  --t-gather: #d6b73c; --t-wait: #3a424b; --t-own: #5ccf92; } }
""" + "".join(
    f".t-{kind} {{ fill: var(--t-{kind}); background: var(--t-{kind}); }}\n"
    for kind in dict.fromkeys(kind for kind, _ in KINDS.values())
)


def timelines(engines: Sequence[EngineReport]) -> str:
    """HTML of all engines that were traced; nothing when none was."""
    traced = [engine for engine in engines if engine.timeline]
    if not traced:
        return ""
    longest = max(bar.start + bar.duration for engine in traced for bars in engine.timeline.values() for bar in bars)
    parts = ["<h2>Decode steps of batch 1, rank by rank</h2>"]
    for engine in traced:
        parts += [f"<h3>{escape(engine.name)}</h3>", _engine(engine, longest)]
    legend = (f'<span class="swatch t-{kind}"></span>{escape(words)}' for kind, words in KINDS.values() if words)
    parts.append(f'<p>{"<br>".join(legend)}</p><p class="soft">From a second run that recorded its steps.</p>')
    return "\n".join(parts)


def _engine(engine: EngineReport, longest: float) -> str:
    room, shapes, y = WIDTH - LABEL_WIDTH, [], 4
    for rank, bars in engine.timeline.items():
        shapes.append(f'<text x="{LABEL_WIDTH - 8}" y="{y + LANE - 8}" text-anchor="end">{escape(rank)}</text>')
        for bar in bars:
            kind, width = KINDS[bar.name][0], max(0.5, room * bar.duration / longest)
            x = LABEL_WIDTH + room * bar.start / longest
            shapes.append(
                f'<rect class="t-{kind}" x="{x:.2f}" y="{y}" width="{width:.2f}" '
                f'height="{LANE - 2}"><title>{escape(bar.name)}: {bar.duration:,.1f} us</title></rect>'
            )
        y += LANE + 2
    end = max(bar.start + bar.duration for bars in engine.timeline.values() for bar in bars)
    shapes.append(f'<text x="{LABEL_WIDTH}" y="{y + GAP}">0</text>')
    x = LABEL_WIDTH + room * end / longest
    shapes.append(f'<text x="{x:.1f}" y="{y + GAP}" text-anchor="end">{end / 1e3:.2f} ms</text>')
    height = y + GAP + 6
    return (
        f'<div class="wide"><svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" '
        f'aria-label="{escape(engine.name)}">{"".join(shapes)}</svg></div>'
    )
