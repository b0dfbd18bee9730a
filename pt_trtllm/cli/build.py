"""`pt-trtllm build`"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from pt_trtllm.checkpoint.rank_files import CheckpointConfig, open_checkpoint
from pt_trtllm.cli.options import EXISTING_FILE, EXISTING_FOLDER, FOLDER, progress_bar
from pt_trtllm.engine.build import BuildOptions, build
from pt_trtllm.engine.bundle import BackendOptions, BuildLimits
from pt_trtllm.engine.recipe import GIB, Recipe, rank_memory, read_recipe
from pt_trtllm.engine.registry import BACKENDS
from pt_trtllm.errors import ConfigError

DEFAULTS = BuildLimits()
FROM_RECIPE = ("backend", "target", "max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens",
               "gather_context_logits")  # fmt: skip


@click.command("build")
@click.option("--checkpoint-dir", type=EXISTING_FOLDER, help="Output of `pt-trtllm convert`.")
@click.option("--output-dir", type=FOLDER, help="Engine folder to write; made whole or not at all.")
@click.option("--recipe", type=EXISTING_FILE, help="A YAML file with the limits and the hardware to build for.")
@click.option("--dry-run", is_flag=True, help="Only count the memory of a rank; builds nothing.")
@click.option("--backend", type=click.Choice([*BACKENDS]), default="cpu", show_default=True)
@click.option("--target", default="", help="GPUs to build for, like sm89,sm120.  [default: the one present]")
@click.option(
    "--max-batch-size", type=int, default=DEFAULTS.max_batch_size, show_default=True, help="Sequences at once."
)
@click.option("--max-input-len", type=int, default=0, help="Longest prompt.  [default: max-seq-len - 1]")
@click.option(
    "--max-seq-len",
    type=int,
    default=0,
    help="Prompt and answer together.  [default: the model's positions, at most 4096]",
)
@click.option(
    "--max-num-tokens", type=int, default=DEFAULTS.max_num_tokens, show_default=True, help="Tokens of one forward pass."
)
@click.option("--gather-context-logits", is_flag=True, help="tensorrt: allow asking for a prompt's logits.")
@click.option("--workers", type=int, default=0, help="tensorrt: ranks built at a time.  [default: as many as fit]")
@click.option("--force", is_flag=True, help="Replace an existing output folder.")
@click.pass_context
def command(
    context: click.Context, /, checkpoint_dir: Path | None, output_dir: Path | None, recipe: Path | None, dry_run: bool,
    workers: int, force: bool, **settings: Any,
) -> None:  # fmt: skip
    """Build per-rank engines from a converted checkpoint."""
    found = _checkpoint(checkpoint_dir)
    if recipe is not None:
        _refuse_both(context)
        planned = read_recipe(recipe)
        if found is not None and checkpoint_dir is not None:
            planned.check_checkpoint(found, checkpoint_dir)
        planned.check_memory()
        options = _from_recipe(planned, workers, force)
    else:
        options = _from_flags(settings, workers, force)
    if dry_run:
        _report(found, options, planned if recipe is not None else None)
        return
    if checkpoint_dir is None or output_dir is None:
        raise ConfigError("build needs --checkpoint-dir and --output-dir; with --recipe and --dry-run it needs neither")
    with progress_bar("building") as progress:
        config = build(checkpoint_dir, output_dir, options, progress)
    targets = ", ".join(config.backend_config.get("targets", ()))
    click.echo(
        f"{output_dir}: {options.backend} engine for {config.mapping.world_size} ranks{targets and f' on {targets}'}, "
        f"up to {config.limits.max_batch_size} sequences of {config.limits.max_seq_len} tokens"
    )


def _checkpoint(folder: Path | None) -> CheckpointConfig | None:
    return None if folder is None else open_checkpoint(folder)[0]


def _refuse_both(context: click.Context) -> None:
    given = [
        f"--{name.replace('_', '-')}"
        for name in FROM_RECIPE
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    ]
    if given:
        raise ConfigError(f"{', '.join(given)} come from the recipe; change it, or leave --recipe out")


def _from_recipe(recipe: Recipe, workers: int, force: bool) -> BuildOptions:
    backend_options = dataclasses.replace(recipe.backend_options, workers=workers)
    return BuildOptions(backend=recipe.backend, limits=recipe.limits, backend_options=backend_options, force=force)


def _from_flags(settings: dict[str, Any], workers: int, force: bool) -> BuildOptions:
    targets = tuple(target.strip().lower() for target in settings["target"].split(",") if target.strip())
    return BuildOptions(
        backend=settings["backend"],
        limits=BuildLimits(**{field.name: settings[field.name] for field in dataclasses.fields(BuildLimits)}),
        backend_options=BackendOptions(
            targets=targets, gather_context_logits=settings["gather_context_logits"], workers=workers
        ),
        force=force,
    )


def _report(found: CheckpointConfig | None, options: BuildOptions, recipe: Recipe | None) -> None:
    """What one rank needs, and how much of the GPU that is."""
    checkpoint = recipe.checkpoint if recipe is not None else found
    if checkpoint is None:
        raise ConfigError("--dry-run needs --recipe or --checkpoint-dir")
    limits = options.limits.resolve(checkpoint.model.max_position_embeddings)
    memory, mapping = rank_memory(checkpoint, limits, options.backend_options), checkpoint.mapping
    quantization = "" if checkpoint.quantization.method == "none" else f" {checkpoint.quantization.method}"
    click.echo(
        f"{checkpoint.dtype}{quantization}, {mapping.num_tracks} tracks of {checkpoint.model.num_hidden_layers} layers "
        f"fused every {checkpoint.model.interval}, {mapping.world_size} ranks; "
        f"{limits.max_batch_size} sequences of {limits.max_seq_len} tokens"
    )
    for name in ("weights", "kv_cache", "activations", "runtime", "total"):
        click.echo(f"  {name.replace('_', ' '):<12}{getattr(memory, name) / GIB:8.2f} GiB per rank")
    if recipe is not None:
        hardware = recipe.hardware
        click.echo(
            f"  fits {hardware.count} x {hardware.gpu}: {hardware.usable_gib:.1f} GiB are usable of each one's "
            f"{hardware.memory_gib:g}"
        )
