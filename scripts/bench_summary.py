"""SUMMARY.md of a folder that `scripts/bench_all.sh` filled: machine, versions, engines in one table, all outputs.

python scripts/bench_summary.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pt_trtllm.bench.machine import hardware, versions
from pt_trtllm.checkpoint.artifact import replace_file

RUNS = ("small_pt_tp", "small_llama", "large_pt", "large_llama")
COLUMNS = "engine | load s | first token 128 / 512 ms | tokens/s batch 1 (GB/s, of the machine's) | batch 8 | syncs"


def engine_rows(report: dict[str, Any]) -> list[str]:
    """The columns in which engines are usually compared."""
    rows = []
    for engine in report["engines"]:
        first = " / ".join(
            f"{engine['ttft_ms'][n]['median']:.0f}" if n in engine["ttft_ms"] else "-" for n in ("128", "512")
        )
        tokens = engine["decode_tokens_per_s"]
        reads = engine["decode_bandwidth"]["1"]
        syncs = engine["collectives_per_pass"]["track_fusion"] + engine["collectives_per_pass"]["tensor_parallel"]
        cells = [
            f"{engine['name']}, {engine['parameters'] / 1e6:.0f} million",
            f"{engine['load_s']:.1f}",
            first,
            f"{tokens['1']:.1f} ({reads['gb_per_s']:.1f}, {reads['share_of_machine']:.0%})",
            f"{tokens['8']:.1f}" if "8" in tokens else "-",
            str(syncs),
        ]
        rows.append(" | ".join(cells))
    return rows


def main() -> None:
    folder = Path(sys.argv[1])
    lines = ["# Benchmarks", ""]
    lines += [f"- {name}: {value}" for name, value in {**hardware(), **versions()}.items()]
    for name in RUNS:
        path = folder / f"{name}.json"
        if path.exists():
            report = json.loads(path.read_text())
            before, after = report["load_average"]
            lines += [
                "",
                f"## {name}",
                f"`{report['command']}`: {report['repeats_done']} repeats, load {before:.1f} "
                f"before, {after:.1f} after.",
                "",
                f"| {COLUMNS} |",
                "|---|---:|---:|---:|---:|---:|",
            ]
            lines += [f"| {row} |" for row in engine_rows(report)]
    for path in sorted(folder.glob("*.txt")):
        lines += ["", f"## {path.stem}", "", "```", path.read_text().rstrip(), "```"]
    with replace_file(folder / "SUMMARY.md") as work:
        work.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
