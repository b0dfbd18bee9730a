"""`pt-trtllm deploy`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pt_trtllm.cli.options import EXISTING_FILE, EXISTING_FOLDER, FOLDER, NameChoice
from pt_trtllm.runtime.scheduler import POLICIES
from pt_trtllm.serving.repository import DeployOptions, deploy

DEFAULTS = DeployOptions()


@click.command("deploy")
@click.option("--engine-dir", required=True, type=EXISTING_FOLDER, help="Output of `pt-trtllm build`.")
@click.option("--tokenizer-dir", type=EXISTING_FOLDER, help="Folder with tokenizer.json.  [default: the engine's own]")
@click.option("--model-repository", required=True, type=FOLDER, help="Folder to write; made whole or not at all.")
@click.option(
    "--max-queue-size", type=int, default=DEFAULTS.max_queue_size, show_default=True, help="More are refused."
)
@click.option(
    "--exclude-input-in-output/--include-input-in-output", default=True, show_default=True,
    help="Whether answers leave out the prompt, where a request does not say.",
)  # fmt: skip
@click.option(
    "--decoupled/--no-decoupled", default=True, show_default=True,
    help="Without: one response per request, for clients of ModelInfer and HTTP infer; nothing streams.",
)  # fmt: skip
@click.option("--max-tokens-in-paged-kv-cache", type=int, default=0, help="Size of the KV cache.  [default: by memory]")
@click.option(
    "--kv-cache-free-mem-fraction", type=float, default=DEFAULTS.kv_cache_free_mem_fraction, show_default=True
)
@click.option("--scheduler-policy", type=NameChoice(POLICIES), default=POLICIES[0], show_default=True)
@click.option(
    "--enable-block-reuse/--no-block-reuse", default=True, show_default=True, help="Share common beginnings of prompts."
)
@click.option("--hostfile", type=EXISTING_FILE, help="Hosts for mpirun.")
@click.option(
    "--triton-max-batch-size", type=int, default=DEFAULTS.triton_max_batch_size, show_default=True,
    help="Prompts of one request; not the engine's running batch.",
)  # fmt: skip
@click.option(
    "--step-timeout-s", type=float, default=DEFAULTS.step_timeout_s, show_default=True,
    help="Restart an engine that stands still for so long.",
)  # fmt: skip
@click.option("--preprocessing-instances", type=int, default=1, show_default=True, help="Processes.")
@click.option(
    "--postprocessing-instances", type=int, default=1, show_default=True,
    help="Processes. With several, a request to the ensemble runs on when its client has left.",
)  # fmt: skip
@click.option(
    "--bls-instances", type=int, default=DEFAULTS.bls_instances, show_default=True,
    help="Processes, and so requests that tensorrt_llm_bls answers at the same time.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace an existing output folder.")
def command(engine_dir: Path, tokenizer_dir: Path | None, model_repository: Path, **options: Any) -> None:
    """Write a Triton model repository for an engine and a tokenizer."""
    deploy(engine_dir, tokenizer_dir, model_repository, DeployOptions(**options))
    click.echo(f"{model_repository}: serve it with: pt-trtllm serve --model-repository {model_repository}")
