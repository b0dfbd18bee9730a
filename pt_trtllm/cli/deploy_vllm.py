"""What `pt-trtllm deploy --backend vllm` can be told."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from pt_trtllm.cli.options import EXISTING_FOLDER
from pt_trtllm.cli.requests import parse_json
from pt_trtllm.errors import ConfigError
from pt_trtllm.serving.vllm_repository import EXECUTORS, MODEL_NAME, VllmOptions

OPTIONS = (
    click.option("--model-dir", type=EXISTING_FOLDER, help="vllm: a checkpoint of the pt layout."),
    click.option("--model-name", default=MODEL_NAME, show_default=True, help="vllm: what clients ask for."),
    click.option(
        "--served-model-dir", type=click.Path(path_type=Path),
        help="vllm: where the server sees the checkpoint, as in a container.  [default: where it is now]",
    ),
    click.option(
        "--tensor-parallel-size", "--tp-size", type=int, default=1, show_default=True,
        help="vllm: ranks; they divide the tracks, or are a multiple of them.",
    ),
    click.option(
        "--distributed-executor-backend", type=click.Choice(EXECUTORS),
        help="vllm: mp for one node, ray for several.  [default: vLLM's]",
    ),
    click.option("--dtype", help="vllm: auto, bfloat16, float16 or float32.  [default: vLLM's, the checkpoint's]"),
    click.option("--quantization", help="vllm: a method of vLLM's, as fp8.  [default: none]"),
    click.option("--kv-cache-dtype", help="vllm: as fp8.  [default: vLLM's]"),
    click.option(
        "--max-model-len", "--max-seq-len", type=int, help="vllm: prompt and answer together.  [default: the model's]"
    ),
    click.option("--max-num-seqs", "--max-batch-size", type=int, help="vllm: sequences at once.  [default: vLLM's]"),
    click.option(
        "--max-num-batched-tokens", "--max-num-tokens", type=int, help="vllm: tokens of one step.  [default: vLLM's]"
    ),
    click.option("--gpu-memory-utilization", type=float, help="vllm: part of a GPU's memory.  [default: vLLM's]"),
    click.option(
        "--enable-prefix-caching/--no-enable-prefix-caching", default=None,
        help="vllm: share common beginnings of prompts.  [default: vLLM's]",
    ),
    click.option("--enforce-eager/--no-enforce-eager", default=None, help="vllm: neither compile nor capture graphs."),
    click.option("--additional-config", help="vllm: options of the plugin, as JSON."),
    click.option(
        "--engine-arg", "engine_args", multiple=True, metavar="NAME=VALUE",
        help="vllm: any other argument of its engine; the value is JSON, or text. May be repeated.",
    ),
    click.option(
        "--report-custom-metrics", is_flag=True, help="vllm: its own metrics at Triton's metrics port; they cost time."
    ),
)  # fmt: skip


def vllm_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def to_vllm_options(values: dict[str, Any], *, force: bool) -> VllmOptions:
    """Of the command line's values, without `model_dir`."""
    additional = values.pop("additional_config")
    return VllmOptions(
        **{**values, "engine_args": _engine_args(values["engine_args"])},
        additional_config=None if additional is None else _object(additional),
        force=force,
    )


def _object(text: str) -> dict[str, Any]:
    value = parse_json(text, "--additional-config")
    if not isinstance(value, dict):
        raise ConfigError(f'--additional-config is {text}, expected a JSON object, as {{"parallel_track": {{}}}}')
    return value


def _engine_args(given: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE by vLLM's names of AsyncEngineArgs; as options they have a dash for every underscore."""
    args: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.lstrip("-").replace("-", "_")
        if not (equals and name.isidentifier()):
            raise ConfigError(f"--engine-arg is {text!r}, expected NAME=VALUE, as max_logprobs=20")
        if name in args:
            raise ConfigError(f"--engine-arg gives {name} twice")
        try:
            args[name] = json.loads(value)
        except (ValueError, RecursionError):
            args[name] = value
    return args
