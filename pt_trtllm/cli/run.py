"""`pt-trtllm run`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pt_trtllm.checkpoint.artifact import replace_file
from pt_trtllm.checkpoint.safetensors_io import DeclaredTensor, SafetensorsWriter
from pt_trtllm.cli.options import EXISTING_FILE, EXISTING_FOLDER, FILE, NameChoice, check_outputs, progress_bar
from pt_trtllm.cli.requests import parse_entry, read_entries
from pt_trtllm.cli.sampling import sampling_options, sampling_params
from pt_trtllm.comm.coding import ALGORITHMS, CODECS
from pt_trtllm.engine.bundle import open_bundle
from pt_trtllm.errors import ConfigError
from pt_trtllm.network.kv_cache import KV_CACHE_DTYPES
from pt_trtllm.runtime.llm import LLM, make_request
from pt_trtllm.runtime.logprobs import TokenLogprobs
from pt_trtllm.runtime.options import RuntimeOptions
from pt_trtllm.runtime.outputs import CompletionOutput, RequestOutput
from pt_trtllm.runtime.scheduler import POLICIES
from pt_trtllm.runtime.speculative.config import METHODS, PLACEMENTS, SpeculativeConfig
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
@sampling_options
@click.option("--logprobs", type=int, help="Report each token's log-probability and those of this many others.")
@click.option("--prompt-logprobs", type=int, help="The same for the tokens of the prompt.")
@click.option("--n", type=int, default=1, help="Answers per prompt.")
@click.option("--output-json", type=FILE, help="Write outputs and statistics here.")
@click.option("--context-logits", type=FILE, help="Write the logits of every prompt token here (safetensors).")
@click.option("--max-tokens-in-paged-kv-cache", type=int, default=0, help="Size of the KV cache.  [default: by memory]")
@click.option("--kv-cache-free-mem-fraction", type=float, default=0.5, show_default=True)
@click.option("--kv-cache-dtype", type=click.Choice(KV_CACHE_DTYPES), default=KV_CACHE_DTYPES[0], show_default=True)
@click.option("--scheduler-policy", type=NameChoice(POLICIES), default=POLICIES[0], show_default=True)
@click.option("--no-block-reuse", is_flag=True, help="Compute common beginnings of prompts every time.")
@click.option("--speculative", type=click.Choice(METHODS), help="Guess tokens ahead; the answers stay the same.")
@click.option("--max-draft-len", type=int, default=4, show_default=True, help="Guesses per pass.")
@click.option("--max-matching-ngram-size", type=int, default=3, show_default=True)
@click.option("--draft-engine-dir", type=EXISTING_FOLDER, help="A smaller engine with the same vocabulary.")
@click.option("--draft-placement", type=NameChoice(PLACEMENTS), default=PLACEMENTS[0], show_default=True)
@click.option("--draft-hostfile", type=EXISTING_FILE, help="Hosts of the draft engine's own ranks.")
@click.option(
    "--fusion-codec",
    type=click.Choice(CODECS),
    default=CODECS[0],
    show_default=True,
    help="Send hidden states between ranks as codes of fewer bits; answers change a little.",
)
@click.option("--fusion-delta", is_flag=True, help="Encode what the layers changed: smaller errors, same bits.")
@click.option("--fusion-algorithm", type=NameChoice(ALGORITHMS), default=ALGORITHMS[0], show_default=True)
@click.option("--hostfile", type=EXISTING_FILE, help="Hosts for mpirun.")
def command(
    engine_dir: Path, prompts: tuple[str, ...], more_prompts: tuple[str, ...], input_ids: str | None,
    input_file: Path | None, tokenizer_dir: Path | None, output_json: Path | None, context_logits: Path | None,
    hostfile: Path | None, max_new_tokens: int, max_tokens_in_paged_kv_cache: int, kv_cache_free_mem_fraction: float,
    kv_cache_dtype: str, scheduler_policy: str, no_block_reuse: bool, fusion_codec: str, fusion_delta: bool,
    fusion_algorithm: str, speculative: str | None, max_draft_len: int, max_matching_ngram_size: int,
    draft_engine_dir: Path | None, draft_placement: str, draft_hostfile: Path | None, **sampling: Any,
) -> None:  # fmt: skip
    """Generate with an engine, over as many MPI ranks as it was built for."""
    check_outputs({"--output-json": output_json, "--context-logits": context_logits})
    params = sampling_params(max_new_tokens, sampling)
    options = RuntimeOptions(
        max_tokens_in_paged_kv_cache=max_tokens_in_paged_kv_cache,
        kv_cache_free_mem_fraction=kv_cache_free_mem_fraction,
        enable_block_reuse=not no_block_reuse,
        kv_cache_dtype=kv_cache_dtype,
        scheduler_policy=scheduler_policy,
        speculative=None
        if speculative is None
        else SpeculativeConfig(
            method=speculative,
            max_draft_len=max_draft_len,
            max_matching_ngram_size=max_matching_ngram_size,
            draft_engine_dir=str(draft_engine_dir.resolve()) if draft_engine_dir else None,
            draft_placement=draft_placement,
            draft_hostfile=str(draft_hostfile.resolve()) if draft_hostfile else None,
        ),
        fusion_codec=fusion_codec,
        fusion_delta=fusion_delta,
        fusion_algorithm=fusion_algorithm,
    )
    if draft_engine_dir is not None and speculative != "draft":
        raise ConfigError("--draft-engine-dir was given; it needs --speculative draft")
    if more_prompts and not prompts:
        raise ConfigError(f"unexpected argument {more_prompts[0]!r}; texts follow --prompt")
    entries = read_entries([*prompts, *more_prompts], input_ids, input_file)
    if not entries:
        raise ConfigError("no prompt given; expected at least one")
    parsed = [parse_entry(entry, label, params) for label, entry in entries]
    config, _ = open_bundle(engine_dir)
    tokenizer = find_tokenizer(engine_dir, tokenizer_dir)
    for (label, _), (prompt, own) in zip(entries, parsed, strict=True):
        if tokenizer is None and isinstance(prompt, str):
            raise ConfigError("this engine came without a tokenizer: give --tokenizer-dir, or prompts as --input-ids")
        make_request(prompt, own, tokenizer, label).check(config, label)
    with LLM(engine_dir, tokenizer_dir=tokenizer_dir, hostfile=hostfile, options=options) as llm:
        with progress_bar("generating") as progress:
            results = llm.generate(
                [prompt for prompt, _ in parsed],
                [own for _, own in parsed],
                prompt_logits=context_logits is not None,
                progress=progress,
            )
        stats = llm.stats()
    outputs = [_result_to_json(result) for result in results]
    if output_json is not None:
        with replace_file(output_json) as path:
            path.write_text(json.dumps({"outputs": outputs, "stats": stats}, indent=2, ensure_ascii=False) + "\n")
    if context_logits is not None:
        _write_logits(context_logits, results)
    for (_, entry), result in zip(entries, results, strict=True):
        for sample in result.outputs:
            click.echo(f"{entry['prompt']}{sample.text}" if "prompt" in entry else json.dumps(sample.token_ids))
    for (label, _), (_, own), result in zip(entries, parsed, results, strict=True):
        room = config.limits.max_seq_len - len(result.prompt_token_ids)
        if room < own.max_tokens and any(sample.finish_reason == "length" for sample in result.outputs):
            click.echo(f"note: {label} ended after {room} of {own.max_tokens} tokens, at the engine's max_seq_len of "
                       f"{config.limits.max_seq_len}; build it with a larger one for more", err=True)  # fmt: skip
    _print_stats(stats)


def _result_to_json(result: RequestOutput) -> dict[str, Any]:
    """One prompt's entry; what was not asked for has no key."""
    data = {"input_ids": list(result.prompt_token_ids), **_sample_to_json(result.outputs[0])}
    if result.prompt_logprobs is not None:
        rows = zip(result.prompt_token_ids, result.prompt_logprobs, strict=True)
        data["prompt_logprobs"] = [row and _logprobs_to_json(token, row) for token, row in rows]
    if len(result.outputs) > 1:
        data["samples"] = [_sample_to_json(sample) for sample in result.outputs]
    return data


def _sample_to_json(sample: CompletionOutput) -> dict[str, Any]:
    data: dict[str, Any] = {
        "output_ids": list(sample.token_ids), "text": sample.text, "finish_reason": sample.finish_reason,
    }  # fmt: skip
    if sample.stop_reason is not None:
        data["stop_reason"] = sample.stop_reason
    if sample.logprobs is not None:
        rows = zip(sample.token_ids, sample.logprobs, strict=True)
        data["logprobs"] = [_logprobs_to_json(token, row) for token, row in rows]
        data["cumulative_logprob"] = sample.cumulative_logprob
    return data


def _logprobs_to_json(token: int, row: TokenLogprobs) -> dict[str, Any]:
    """`top` has the most likely tokens, and the token in question even where it is not among them."""
    top = sorted(row.items(), key=lambda item: item[1].rank)
    return {
        "token_id": token,
        "logprob": row[token].logprob,
        "rank": row[token].rank,
        "top": [[other, entry.logprob] for other, entry in top],
    }


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
        f"{stats['seconds_to_first_token'] * 1e3:.0f} ms, {rate:.1f} tokens/s{_acceptance(stats)}]",
        err=True,
    )


def _acceptance(stats: dict[str, Any]) -> str:
    drafted, accepted = stats["drafted_tokens"], stats["accepted_tokens"]
    return f", {accepted} of {drafted} guesses right ({accepted / drafted:.0%})" if drafted else ""
