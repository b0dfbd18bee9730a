"""`pt-trtllm run`"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from pt_trtllm.checkpoint.artifact import replace_file
from pt_trtllm.checkpoint.safetensors_io import DeclaredTensor, SafetensorsWriter
from pt_trtllm.cli.options import EXISTING_FILE, EXISTING_FOLDER, FILE, progress_bar
from pt_trtllm.engine.bundle import open_bundle
from pt_trtllm.errors import ConfigError
from pt_trtllm.runtime.llm import LLM, RequestOutput
from pt_trtllm.runtime.options import RuntimeOptions
from pt_trtllm.runtime.request import Request
from pt_trtllm.runtime.sampling import SamplingParams
from pt_trtllm.runtime.scheduler import POLICIES
from pt_trtllm.runtime.tokenizer import find_tokenizer


@click.command("run")
@click.option("--engine-dir", required=True, type=EXISTING_FOLDER, help="Output of `pt-trtllm build`.")
@click.option("--prompt", "prompts", multiple=True, help="Text to continue; several may follow one --prompt.")
@click.argument("more_prompts", nargs=-1, metavar="[TEXT]...")
@click.option("--input-ids", help="Token ids as JSON: [[1,2,3],[4,5]].")
@click.option(
    "--input-file",
    type=EXISTING_FILE,
    help='One JSON object per line: {"prompt": TEXT} or {"input_ids": [...]}, with sampling options of its own.',
)
@click.option("--tokenizer-dir", type=EXISTING_FOLDER, help="Folder with tokenizer.json.  [default: the engine's own]")
@click.option("--max-new-tokens", "--max-output-len", type=int, default=64, show_default=True)
@click.option("--temperature", type=float, help="0 is greedy.  [default: greedy unless another option is set]")
@click.option("--top-k", type=int)
@click.option("--top-p", type=float)
@click.option("--min-p", type=float)
@click.option("--repetition-penalty", type=float, default=1.0)
@click.option("--presence-penalty", type=float, default=0.0)
@click.option("--frequency-penalty", type=float, default=0.0)
@click.option("--seed", type=int)
@click.option("--min-tokens", type=int, default=0)
@click.option("--stop-token-id", "stop_token_ids", type=int, multiple=True)
@click.option("--ignore-eos", is_flag=True)
@click.option("--output-json", type=FILE, help="Write outputs and statistics here.")
@click.option("--context-logits", type=FILE, help="Write the logits of every prompt token here (safetensors).")
@click.option("--max-tokens-in-paged-kv-cache", type=int, default=0, help="Size of the KV cache.  [default: by memory]")
@click.option("--kv-cache-free-mem-fraction", type=float, default=0.5, show_default=True)
@click.option("--scheduler-policy", type=click.Choice(POLICIES), default=POLICIES[0], show_default=True)
@click.option("--no-block-reuse", is_flag=True, help="Compute common beginnings of prompts every time.")
@click.option("--hostfile", type=EXISTING_FILE, help="Hosts for mpirun.")
def command(
    engine_dir: Path, prompts: tuple[str, ...], more_prompts: tuple[str, ...], input_ids: str | None,
    input_file: Path | None, tokenizer_dir: Path | None, output_json: Path | None, context_logits: Path | None,
    hostfile: Path | None, max_new_tokens: int, max_tokens_in_paged_kv_cache: int, kv_cache_free_mem_fraction: float,
    scheduler_policy: str, no_block_reuse: bool, **sampling: Any,
) -> None:  # fmt: skip
    """Generate with an engine, over as many MPI ranks as it was built for."""
    for path in (output_json, context_logits):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{path}: the folder {path.absolute().parent} does not exist")
    params = SamplingParams(max_tokens=max_new_tokens, **sampling)
    options = RuntimeOptions(
        max_tokens_in_paged_kv_cache=max_tokens_in_paged_kv_cache,
        kv_cache_free_mem_fraction=kv_cache_free_mem_fraction,
        enable_block_reuse=not no_block_reuse,
        scheduler_policy=scheduler_policy,
    )
    if more_prompts and not prompts:
        raise ConfigError(f"unexpected argument {more_prompts[0]!r}; texts follow --prompt")
    entries = _entries([*prompts, *more_prompts], input_ids, input_file)
    if not entries:
        raise ConfigError("no prompt given; expected at least one")
    parsed = [_request(entry, label, params) for label, entry in entries]
    config, _ = open_bundle(engine_dir)
    tokenizer = find_tokenizer(engine_dir, tokenizer_dir)
    for (label, _), (prompt, own) in zip(entries, parsed, strict=True):
        if tokenizer is None and isinstance(prompt, str):
            raise ConfigError("this engine came without a tokenizer: give --tokenizer-dir, or prompts as --input-ids")
        ids = tokenizer.encode(prompt) if tokenizer and isinstance(prompt, str) else prompt
        Request(prompt_ids=tuple(ids), params=own).check(config, label)  # type: ignore[arg-type]
    with LLM(engine_dir, tokenizer_dir=tokenizer_dir, hostfile=hostfile, options=options) as llm:
        with progress_bar("generating") as progress:
            results = llm.generate(
                [prompt for prompt, _ in parsed],
                [own for _, own in parsed],
                prompt_logits=context_logits is not None,
                progress=progress,
            )
        stats = llm.stats()
    outputs = [
        {
            "input_ids": list(result.prompt_token_ids),
            "output_ids": list(result.outputs[0].token_ids),
            "text": result.outputs[0].text,
            "finish_reason": result.outputs[0].finish_reason,
        }
        for result in results
    ]
    if output_json is not None:
        with replace_file(output_json) as path:
            path.write_text(json.dumps({"outputs": outputs, "stats": stats}, indent=2, ensure_ascii=False) + "\n")
    if context_logits is not None:
        _write_logits(context_logits, results)
    for (_, entry), output in zip(entries, outputs, strict=True):
        click.echo(f"{entry['prompt']}{output['text']}" if "prompt" in entry else json.dumps(output["output_ids"]))
    _print_stats(stats)


def _entries(prompts: list[str], input_ids: str | None, input_file: Path | None) -> list[tuple[str, dict[str, Any]]]:
    """(label for messages, {"prompt": ...} or {"input_ids": ...} with options) from the one way that was used."""
    if sum((bool(prompts), input_ids is not None, input_file is not None)) != 1:
        raise ConfigError("give exactly one of --prompt, --input-ids and --input-file")
    if prompts:
        return [(f"prompt {index}", {"prompt": text}) for index, text in enumerate(prompts)]
    if input_ids is not None:
        ids = _json(input_ids, "--input-ids")
        if isinstance(ids, list) and ids and all(isinstance(token, int) for token in ids):
            ids = [ids]
        if not isinstance(ids, list):
            raise ConfigError("--input-ids: expected lists of token ids, as [[1,2,3],[4,5]]")
        return [(f"--input-ids {index}", {"input_ids": row}) for index, row in enumerate(ids)]
    assert input_file is not None
    lines = enumerate(input_file.read_text(encoding="utf-8").splitlines(), start=1)
    return [(f"{input_file}:{n}", _json(line, f"{input_file}:{n}")) for n, line in lines if line.strip()]


def _request(entry: Any, label: str, defaults: SamplingParams) -> tuple[str | list[int], SamplingParams]:
    """(text or token ids, its sampling options)"""
    if not isinstance(entry, dict) or ("prompt" in entry) == ("input_ids" in entry):
        raise ConfigError(f'{label}: expected an object with either "prompt" or "input_ids"')
    options = {key: value for key, value in entry.items() if key not in ("prompt", "input_ids")}
    unknown = sorted(set(options) - {field.name for field in dataclasses.fields(SamplingParams)})
    if unknown:
        raise ConfigError(f"{label}: unknown options {unknown}")
    if "stop_token_ids" in options:
        options["stop_token_ids"] = tuple(options["stop_token_ids"])
    try:
        params = dataclasses.replace(defaults, **options)
    except TypeError as error:
        raise ConfigError(f"{label}: {error}") from None
    if "prompt" in entry:
        if not isinstance(entry["prompt"], str):
            raise ConfigError(f"{label}: prompt is {json.dumps(entry['prompt'])[:80]}, expected text")
        return entry["prompt"], params
    ids = entry["input_ids"]
    if not (isinstance(ids, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)):
        raise ConfigError(f"{label}: input_ids is {json.dumps(ids)[:80]}, expected a list of token ids")
    return ids, params


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where}: not valid JSON: {error}") from None


def _write_logits(target: Path, results: list[RequestOutput]) -> None:
    """One float32 tensor per prompt, named by its index."""
    logits = {
        str(index): result.prompt_logits for index, result in enumerate(results) if result.prompt_logits is not None
    }
    declared = [DeclaredTensor(name, values.dtype, tuple(values.shape)) for name, values in logits.items()]
    with replace_file(target) as path, SafetensorsWriter(path, declared) as writer:
        for name, values in logits.items():
            writer.write(name, values)


def _print_stats(stats: dict[str, Any]) -> None:
    rate = stats["generated_tokens"] / max(stats["seconds"], 1e-9)
    click.echo(
        f"[{stats['world_size']} ranks, {stats['forward_passes']} passes, "
        f"syncs per pass {stats['sync_points_per_forward']}, first token after "
        f"{stats['seconds_to_first_token'] * 1e3:.0f} ms, {rate:.1f} tokens/s]",
        err=True,
    )
