"""The report in rows, one per measure, and as a table for the terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from pt_trtllm.bench.numbers import Spread, ratio
from pt_trtllm.bench.report import EngineReport, Report, Run

Engine = TypeVar("Engine")
COLLECTIVES = {"track_fusion": "track fusions", "tensor_parallel": "all-reduces", "logits": "logits gathers"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measure over all engines."""

    key: str
    label: str
    values: tuple[float | None, ...]
    notes: tuple[str, ...]
    """Beside each value: percentiles, or what it is a share of."""
    decimals: int = 2
    compared: bool = True


def rows(engines: Sequence[EngineReport]) -> list[Row]:
    """Every measure, in the order of the report."""
    table = Rows(engines)
    table.add("load_s", "load, s", lambda e: e.load_s)
    table.add_spreads("ttft_ms", "first token, prompt of {}, ms", lambda e: e.ttft_ms)
    table.add_spreads("tpot_ms", "per token, batch {}, ms", lambda e: e.tpot_ms)
    table.add_each("decode_tokens_per_s", "decode, batch {}, tokens/s", lambda e: e.decode_tokens_per_s, decimals=1)
    table.add_each("prefill_tflop_per_s", "prompt of {}, TFLOP/s", lambda e: e.prefill_tflop_per_s, decimals=3)
    table.add_spread("tokens_per_s", "request mix, tokens/s", lambda e: e.tokens_per_s)
    table.add_spread("requests_per_s", "request mix, requests/s", lambda e: e.requests_per_s)
    table.add_spread("mix_ttft_ms", "request mix, first token, ms", lambda e: e.mix_ttft_ms)
    table.add_spread("mix_latency_ms", "request mix, whole answer, ms", lambda e: e.mix_latency_ms)
    table.add("forward_passes", "forward passes", lambda e: e.forward_passes, decimals=0, compared=False)
    table.add("layer_syncs", "syncs of layers per pass", lambda e: layer_syncs(e.collectives_per_pass), decimals=0)
    table.add_each(
        "collectives",
        "- {}",
        lambda e: {COLLECTIVES[kind]: count for kind, count in e.collectives_per_pass.items()},
        decimals=0,
        compared=False,
    )
    table.add_each(
        "collective_share",
        "time in collectives, {}, %",
        lambda e: {key.replace("/", " batch "): 100 * share for key, share in e.collective_share.items()},
        decimals=1,
    )
    table.add_each(
        "own_work_us",
        "rank 0's own work per pass, {}, us",
        lambda e: {key.replace("/", " batch "): value for key, value in e.own_work_us.items()},
        decimals=0,
    )
    for name, label in (
        ("kernel_share", "native kernels"),
        ("collective_share", "collectives and broadcast"),
        ("other_share", "all else"),
    ):
        table.add_each(
            f"step/{name}",
            f"decode step, batch {{}}: {label}, %",
            lambda e, name=name: {batch: 100 * getattr(times, name) for batch, times in e.decode_steps.items()},  # type: ignore[misc]
            decimals=1,
        )
    table.add("peak_rss_mb", "peak memory, largest rank, MB", lambda e: max(e.peak_rss_mb, default=None), decimals=0)
    table.add_each(
        "decode_gb_per_s",
        "decode reads, batch {}, GB/s",
        lambda e: {batch: reads.gb_per_s for batch, reads in e.decode_bandwidth.items()},
        notes=lambda e: {
            b: f"{reads.share_of_machine:.1%} of the machine's" for b, reads in e.decode_bandwidth.items()
        },
    )
    table.add("machine_gb_per_s", "the machine reads, GB/s", lambda e: e.machine_read_gb_per_s.median, compared=False)
    return table.rows


def layer_syncs(collectives: dict[str, int]) -> int:
    """L/D of parallel tracks, 2L of tensor parallelism."""
    return collectives["track_fusion"] + collectives["tensor_parallel"]


class Rows(Generic[Engine]):
    """Collects rows about engines of one kind of report."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = engines
        self.rows: list[Row] = []

    def add(
        self, key: str, label: str, value: Callable[[Engine], float | None], *, decimals: int = 2,
        compared: bool = True,
    ) -> None:  # fmt: skip
        values = tuple(map(value, self.engines))
        notes = ("",) * len(values)
        self.rows.append(Row(key=key, label=label, values=values, notes=notes, decimals=decimals, compared=compared))

    def add_each(
        self, key: str, label: str, values: Callable[[Engine], dict[str, float]], *, decimals: int = 2,
        compared: bool = True, notes: Callable[[Engine], dict[str, str]] = lambda engine: {},
    ) -> None:  # fmt: skip
        """A row for every key that any engine has."""
        found, said = [values(engine) for engine in self.engines], [notes(engine) for engine in self.engines]
        for part in dict.fromkeys(part for one in found for part in one):
            self.rows.append(
                Row(
                    key=f"{key}/{part}",
                    label=label.format(part),
                    values=tuple(one.get(part) for one in found),
                    notes=tuple(one.get(part, "") for one in said),
                    decimals=decimals,
                    compared=compared,
                )
            )

    def add_spread(self, key: str, label: str, spread: Callable[[Engine], Spread | None]) -> None:
        found = [spread(engine) for engine in self.engines]
        values = tuple(one.median if one else None for one in found)
        self.rows.append(Row(key=key, label=label, values=values, notes=tuple(map(percentiles, found))))

    def add_spreads(self, key: str, label: str, spreads: Callable[[Engine], dict[str, Spread]]) -> None:
        self.add_each(
            key,
            label,
            lambda engine: {part: spread.median for part, spread in spreads(engine).items()},
            notes=lambda engine: {part: percentiles(spread) for part, spread in spreads(engine).items()},
        )


def percentiles(spread: Spread | None) -> str:
    """Nothing of a single sample."""
    if spread is None or spread.num_samples < 2:
        return ""
    return f"{spread.p50:.2f} / {spread.p90:.2f} / {spread.p99:.2f}"


def with_ratios(report: Report) -> Report:
    """The same report, every engine compared to the first."""
    measures = [row for row in rows(report.engines) if row.compared]
    engines = []
    for index, engine in enumerate(report.engines):
        found = {row.key: ratio(row.values[index], row.values[0]) for row in measures}
        known = {key: value for key, value in found.items() if value is not None}
        engines.append(dataclasses.replace(engine, ratios=known))
    return dataclasses.replace(report, engines=tuple(engines))


def cell(row: Row, index: int, first: int = 0) -> str:
    """With the ratio to another engine, the first if no other is named."""
    value = row.values[index]
    if value is None:
        return "-"
    compared = ratio(value, row.values[first]) if row.compared and index != first else None
    return f"{value:,.{row.decimals}f}" + (f" ({compared:.2f}x)" if compared is not None else "")


def engine_line(engine: EngineReport) -> str:
    """What an engine is, in a few words."""
    tracks = f"{engine.num_tracks} tracks, D = {engine.sync_interval}" if engine.num_tracks > 1 else "1 track"
    quantized = "" if engine.quantization == "none" else f", {engine.quantization}"
    return (
        f"{tracks}, {engine.num_layers} layers, {engine.world_size} ranks, {engine.parameters / 1e6:.1f} million "
        f"parameters, {engine.dtype}{quantized}, {engine.engine_bytes / 1e6:.1f} MB"
    )


def machine_line(run: Run) -> str:
    hardware, (before, after) = run.hardware, run.load_average
    return (
        f"{hardware['processor']}, {hardware['cores']} cores, {hardware['memory_gib']:.0f} GiB, {hardware['kernels']}; "
        f"load {before:.1f} before, {after:.1f} after"
    )


def summary_line(run: Run) -> str:
    asked = run.workload["repeats"]
    end = "" if run.complete else "; the time was up before the rest"
    return f"medians over {run.repeats_done} of {asked} repeats, {run.seconds:.0f} s{end}"


LINK_COLUMNS = ("layer_syncs", "ttft_ms/", "tpot_ms/", "tokens_per_s")


def link_table(report: Report) -> list[list[str]]:
    """A heading, then a line per link and engine; ratios are to the first engine over the same link."""
    links = [("shared memory", report.engines)]
    for link in report.links:
        before, after = link.round_trip_us
        about = f"{link.delay} ({link.how}; round trip {before:.0f}, {after:.0f} us)"
        links.append((about if link.complete else f"{about}, {link.repeats_done} repeats", link.engines))
    columns = [row for row in rows(report.engines) if row.key.startswith(LINK_COLUMNS)]
    lines = [["link", "engine", *(column.label for column in columns)]]
    for about, engines in links:
        found = {row.key: row for row in rows(engines)}
        for index, engine in enumerate(engines):
            lines.append([about, engine.name, *(cell(found[c.key], index) if c.key in found else "-" for c in columns)])
    return lines


def text_table(report: Report) -> str:
    """Medians over the repeats with their ratios to the first engine, then percentiles."""
    measures, names = rows(report.engines), [engine.name for engine in report.engines]
    spread = [row for row in measures if any(" / " in note for note in row.notes)]
    return "\n".join(
        [
            machine_line(report),
            ", ".join(f"{name} {version}" for name, version in report.versions.items()),
            "",
            *(f"{engine.name}: {engine_line(engine)}" for engine in report.engines),
            "",
            *aligned([["", *names], *([row.label, *(cell(row, i) for i in range(len(names)))] for row in measures)]),
            "",
            *aligned([["p50 / p90 / p99", *names], *([row.label, *row.notes] for row in spread)]),
            "",
            *([*aligned(link_table(report)), ""] if report.links else []),
            summary_line(report),
        ]
    )


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            [line[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(line[1:], widths[1:], strict=True))]
        ).rstrip()
        for line in lines
    ]
