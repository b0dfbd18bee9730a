"""`pt-trtllm build`"""

from __future__ import annotations

from pathlib import Path

import click

from pt_trtllm.cli.options import EXISTING_FOLDER, FOLDER, progress_bar
from pt_trtllm.engine.build import BuildOptions, build
from pt_trtllm.engine.bundle import BuildLimits
from pt_trtllm.engine.registry import BACKENDS, PLANNED

DEFAULTS = BuildLimits()


@click.command("build")
@click.option("--checkpoint-dir", required=True, type=EXISTING_FOLDER, help="Output of `pt-trtllm convert`.")
@click.option("--output-dir", required=True, type=FOLDER, help="Engine folder to write; made whole or not at all.")
@click.option("--backend", type=click.Choice([*BACKENDS, *PLANNED]), default="cpu", show_default=True)
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
@click.option("--force", is_flag=True, help="Replace an existing output folder.")
def command(
    checkpoint_dir: Path, output_dir: Path, backend: str, max_batch_size: int, max_input_len: int, max_seq_len: int,
    max_num_tokens: int, force: bool,
) -> None:  # fmt: skip
    """Build per-rank engines from a converted checkpoint."""
    limits = BuildLimits(
        max_batch_size=max_batch_size,
        max_input_len=max_input_len,
        max_seq_len=max_seq_len,
        max_num_tokens=max_num_tokens,
    )
    with progress_bar("building") as progress:
        config = build(checkpoint_dir, output_dir, BuildOptions(backend=backend, limits=limits, force=force), progress)
    click.echo(
        f"{output_dir}: {backend} engine for {config.mapping.world_size} ranks, "
        f"up to {config.limits.max_batch_size} sequences of {config.limits.max_seq_len} tokens"
    )
