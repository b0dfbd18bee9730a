"""One JSON file and one Markdown file from what plugins/gpu_check and pt_trtllm.testing.gpu_engines wrote.

Called by scripts/gpu_check.sh.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

NAME = "cuda_fusion_gpu"


def markdown(results: dict[str, Any]) -> str:
    device, lines = results["device"], results["lines"]
    limits: dict[str, Any] = next((line for line in lines if line.get("measure") == "limits"), {})
    checks = [line for line in lines if "check" in line]
    bad = [line for line in checks if not line["good"]]
    text = [
        "# GPU track fusion, and TensorRT engines, on one GPU",
        "",
        f"`scripts/gpu_check.sh` on {device['device']} (compute capability {device['compute_capability']}, driver "
        f"{device['driver']}, runtime {device['runtime']}). All ranks share the GPU: times are the protocol's cost, "
        f"not the latency of links.",
        "",
        f"- checks: {len(checks) - len(bad)} of {len(checks)} good"
        + "".join(f"; FAILED: {json.dumps(line)}" for line in bad),
        f"- compute-sanitizer: {results['sanitizers']}",
        f"- NCCL with two ranks on the GPU: {results['nccl']}",
        f"- collective 'pt' in vLLM, against vLLM's own: {results['vllm']}",
    ]
    text += [f"- {line['note']}: {line['text']}" for line in lines if "note" in line]
    if limits:
        text.append(f"- copy bandwidth {limits['copy_gb_per_s']} GB/s, smallest launch {limits['launch_us']} us")
    text += [
        "",
        "Bytes of one rank's message before the codec.",
        "",
        "| ranks | algorithm | codec | bytes per rank | us | with RMSNorm us |",
        "|---:|---|---|---:|---:|---:|",
    ]
    times = {
        (line["ranks"], line["algorithm"], line["codec"], line["bytes"], line["norm"]): line["us"]
        for line in lines
        if line.get("measure") == "fuse"
    }
    for ranks, algorithm, codec, size, norm in sorted(times):
        if not norm:
            normed = times.get((ranks, algorithm, codec, size, True), "")
            plain = times[ranks, algorithm, codec, size, False]
            text.append(f"| {ranks} | {algorithm} | {codec} | {size} | {plain} | {normed} |")
    return "\n".join([*text, "", *engine_lines(results["engines"])]) + "\n"


def engine_lines(engines: dict[str, Any]) -> list[str]:
    """The executor's part of the report."""
    title = "## TensorRT engines of examples/tiny-pt on one GPU"
    if engines["skipped"]:
        return [title, "", f"Not run: {engines['skipped']}."]
    text = [
        title,
        "",
        f"{engines['library']} on {engines['device']}, against the CPU engine in float32. Logits: largest difference, "
        "relative to the largest logit. Tokens: greedy, up to the first that differs.",
        "",
        "| type | quantization | logits | bound | same tokens | |",
        "|---|---|---:|---:|---:|---|",
    ]
    for line in engines["lines"]:
        verdict = "good" if line["good"] else f"FAILED {line.get('error') or line['wrong_tokens'] or ''}".strip()
        tokens = f"{line['same_tokens']} of {line['tokens']}" if "tokens" in line else ""
        numbers = (line.get("logits_error", ""), line.get("bound", ""), tokens)
        text.append("| " + " | ".join(map(str, (line["dtype"], line["quantization"], *numbers, verdict))) + " |")
    return text


def read_engines(path: Path) -> dict[str, Any]:
    """A check that died wrote nothing."""
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    return {"skipped": "FAILED: it ended before it wrote a result", "lines": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checks", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--sanitizers", required=True)
    parser.add_argument("--nccl", required=True)
    parser.add_argument("--vllm", required=True)
    parser.add_argument("--engines", type=Path, required=True)
    options = parser.parse_args()
    device, *lines = json.loads(options.checks.read_text())
    results = {
        "device": device, "lines": lines, "sanitizers": options.sanitizers, "nccl": options.nccl,
        "vllm": options.vllm, "engines": read_engines(options.engines),
    }  # fmt: skip
    for suffix, content in ((".json", json.dumps(results, indent=1) + "\n"), (".md", markdown(results))):
        temporary = options.output / f".{NAME}{suffix}.part"
        temporary.write_text(content)
        temporary.replace(options.output / f"{NAME}{suffix}")


if __name__ == "__main__":
    main()
