"""`pt-trtllm deploy`"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from pt_trtllm.checkpoint.artifact import read_json
from pt_trtllm.cli.deploy_vllm import to_vllm_options, vllm_options
from pt_trtllm.cli.options import EXISTING_FILE, EXISTING_FOLDER, FOLDER, NameChoice
from pt_trtllm.engine.registry import BACKENDS
from pt_trtllm.errors import ConfigError
from pt_trtllm.runtime.scheduler import POLICIES
from pt_trtllm.serving.repository import DeployOptions, deploy
from pt_trtllm.serving.vllm_repository import BACKEND, deploy_vllm

DEFAULTS = DeployOptions()


@click.command("deploy")
@click.option(
    "--backend",
    type=click.Choice([*BACKENDS, BACKEND]),
    help="vllm serves a checkpoint (--model-dir) with Triton's vLLM backend.  [default: that of the engine]",
)
@click.option("--engine-dir", type=EXISTING_FOLDER, help="Output of `pt-trtllm build`.")
@click.option("--tokenizer-dir", type=EXISTING_FOLDER, help="Folder with tokenizer.json.  [default: the model's own]")
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
@vllm_options
@click.option("--force", is_flag=True, help="Replace an existing output folder.")
@click.pass_context
def command(
    context: click.Context, /, backend: str | None, engine_dir: Path | None, model_dir: Path | None,
    tokenizer_dir: Path | None, model_repository: Path, force: bool, **options: Any,
) -> None:  # fmt: skip
    """Write a Triton model repository for an engine and a tokenizer, or for vLLM and a checkpoint."""
    fields = {field.name for field in dataclasses.fields(DeployOptions)}
    own = {name: value for name, value in options.items() if name in fields}
    of_vllm = {name: value for name, value in options.items() if name not in fields}
    if backend == BACKEND:
        _refuse(context, {*own, "engine_dir"}, "--backend vllm has no")
        if model_dir is None:
            raise click.UsageError("Missing option '--model-dir'.")
        deploy_vllm(model_dir, tokenizer_dir, model_repository, to_vllm_options(of_vllm, force=force))
        click.echo(f"{model_repository}: serve it in NVIDIA's container with Triton's vllm backend and pt-trtllm: "
                   f"tritonserver --model-repository {model_repository.resolve()}")  # fmt: skip
        return
    _refuse(context, {*of_vllm, "model_dir"}, "without --backend vllm there is no")
    if engine_dir is None:
        raise click.UsageError("Missing option '--engine-dir'.")
    _check_backend(engine_dir, backend)
    deploy(engine_dir, tokenizer_dir, model_repository, DeployOptions(**own, force=force))
    click.echo(f"{model_repository}: serve it with: pt-trtllm serve --model-repository {model_repository}")


def _refuse(context: click.Context, names: set[str], why: str) -> None:
    """Options that this backend does not have, where the user gave them."""
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in names and context.get_parameter_source(parameter.name) is not ParameterSource.DEFAULT
    ]
    if given:
        raise ConfigError(f"{why} {', '.join(given)}; leave it out")


def _check_backend(engine_dir: Path, backend: str | None) -> None:
    found = read_json(engine_dir / "config.json", "an engine written by `pt-trtllm build`").get("backend")
    if backend not in (None, found):
        raise ConfigError(f"{engine_dir} is an engine of backend {found!r}, not {backend!r}; leave --backend out")
