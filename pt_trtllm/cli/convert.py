"""`pt-trtllm convert`"""

from __future__ import annotations

from pathlib import Path

import click

from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.checkpoint.quantize import GROUP_SIZES, METHODS, Quantization
from pt_trtllm.checkpoint.sources import SOURCES
from pt_trtllm.cli.options import EXISTING_FOLDER, FOLDER, NameChoice, progress_bar
from pt_trtllm.config import DTYPES
from pt_trtllm.mapping import sync_counts, sync_plan


@click.command("convert")
@click.option("--model-dir", required=True, type=EXISTING_FOLDER, help="Source checkpoint: config.json and weights.")
@click.option("--output-dir", required=True, type=FOLDER, help="Folder to write; made whole or not at all.")
@click.option(
    "--source", type=click.Choice(["auto", *SOURCES]), default="auto", show_default=True, help="Source format."
)
@click.option("--world-size", type=click.IntRange(min=1), default=1, show_default=True, help="Number of ranks.")
@click.option(
    "--dtype", type=click.Choice(["auto", *DTYPES]), default="auto", show_default=True, help="auto: the source's own."
)
@click.option("--quantization", type=NameChoice(METHODS), default="none", show_default=True, help="Of weights.")
@click.option(
    "--group-size",
    type=click.Choice([str(size) for size in GROUP_SIZES]),
    default="128",
    show_default=True,
    help="Inputs per scale of int4_wo.",
)
@click.option("--force", is_flag=True, help="Replace an existing output folder.")
def command(
    model_dir: Path, output_dir: Path, source: str, world_size: int, dtype: str, quantization: str, group_size: str,
    force: bool,
) -> None:  # fmt: skip
    """Convert a checkpoint to per-rank weights in TensorRT-LLM's unified layout."""
    options = ConvertOptions(
        source=source,
        world_size=world_size,
        dtype=dtype,
        quantization=Quantization(method=quantization, group_size=int(group_size)),
        force=force,
    )
    with progress_bar("converting") as progress:
        config = convert(model_dir, output_dir, options, progress)
    model, syncs = config.model, sync_counts(sync_plan(config.model, config.mapping))
    click.echo(
        f"{output_dir}: {model.num_tracks} tracks x {model.num_hidden_layers} layers on {world_size} ranks, "
        f"{config.dtype}, quantization {quantization}; per forward pass: {syncs}"
    )
