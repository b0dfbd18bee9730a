"""`pt-trtllm export`"""

from __future__ import annotations

from pathlib import Path

import click

from pt_trtllm.checkpoint.export import TARGETS, ExportOptions, export
from pt_trtllm.checkpoint.sources import SOURCES
from pt_trtllm.cli.options import EXISTING_FOLDER, FOLDER, byte_size, progress_bar
from pt_trtllm.config import DTYPES


@click.command("export")
@click.option("--model-dir", required=True, type=EXISTING_FOLDER, help="Source checkpoint: config.json and weights.")
@click.option("--to", required=True, type=click.Choice(TARGETS), help="Format to write: pt, our own layout.")
@click.option("--output-dir", required=True, type=FOLDER, help="Folder to write; made whole or not at all.")
@click.option(
    "--source", type=click.Choice(["auto", *SOURCES]), default="auto", show_default=True, help="Source format."
)
@click.option(
    "--dtype", type=click.Choice(["auto", *DTYPES]), default="auto", show_default=True, help="auto: the source's own."
)
@click.option(
    "--max-shard-size",
    type=byte_size,
    default="5GB",
    show_default=True,
    metavar="SIZE",
    help="Larger weights make several files.",
)
@click.option("--force", is_flag=True, help="Replace an existing output folder.")
def command(
    model_dir: Path, to: str, output_dir: Path, source: str, dtype: str, max_shard_size: int, force: bool
) -> None:
    """Write a checkpoint in our `pt` layout, for vLLM, or to convert again."""
    options = ExportOptions(to=to, source=source, dtype=dtype, max_shard_bytes=max_shard_size, force=force)
    with progress_bar("exporting") as progress:
        done = export(model_dir, output_dir, options, progress)
    model, files = done.model, "1 file" if done.num_files == 1 else f"{done.num_files} files"
    tokenizer = "with its tokenizer" if done.has_tokenizer else "without a tokenizer: the source has none"
    click.echo(
        f"{output_dir}: {model.num_tracks} tracks x {model.num_hidden_layers} layers, {done.dtype}, "
        f"{done.num_bytes:,} bytes in {files}, {tokenizer}"
    )
