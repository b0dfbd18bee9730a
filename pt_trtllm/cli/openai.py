"""`pt-trtllm openai`"""

from __future__ import annotations

import logging
from pathlib import Path

import click

from pt_trtllm import env
from pt_trtllm.cli.options import EXISTING_FILE, EXISTING_FOLDER
from pt_trtllm.errors import ConfigError
from pt_trtllm.openai.keys import is_private, read_key_file
from pt_trtllm.openai.options import FrontEndOptions


@click.command("openai")
@click.option("--url", default="127.0.0.1:8001", show_default=True, help="HOST:PORT of Triton's gRPC endpoint.")
@click.option("--tokenizer-dir", required=True, type=EXISTING_FOLDER, help="Folder with tokenizer.json.")
@click.option("--host", default=FrontEndOptions.host, show_default=True)
@click.option("--port", type=int, default=FrontEndOptions.port, show_default=True, help="0 takes a free one.")
@click.option(
    "--model-name",
    default=FrontEndOptions.model_name,
    show_default=True,
    help="The core model in Triton: the one that takes token ids.",
)
@click.option("--served-model-name", default="", help="The name clients ask for.  [default: --model-name]")
@click.option(
    "--chat-template", type=EXISTING_FILE, help="A jinja file.  [default: the tokenizer's own, or a plain transcript]"
)
@click.option("--metrics-url", default="", help="Triton's metrics.  [default: http://HOST OF --url:8002/metrics]")
@click.option(
    "--shutdown-timeout-s",
    type=float,
    default=FrontEndOptions.shutdown_timeout_s,
    show_default=True,
    help="How long answers on their way may take after SIGTERM.",
)
@click.option(
    "--api-key-file",
    type=EXISTING_FILE,
    help="Keys of which clients must send one (Authorization: Bearer KEY), one a line. PT_API_KEYS has more.",
)
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    help="Such a key. Every user of this machine can read a command line: prefer a file.",
)
@click.option("--allow-no-key", is_flag=True, help="Let everybody in also where --host is more than this machine.")
@click.option("--tls-cert", type=EXISTING_FILE, help="Certificate chain in PEM: speaks HTTPS, TLS 1.2 or newer.")
@click.option("--tls-key", type=EXISTING_FILE, help="Its key in PEM.")
@click.option(
    "--max-requests",
    type=int,
    default=FrontEndOptions.max_requests,
    show_default=True,
    help="Requests answered at a time; more are refused with 429.",
)
def command(
    url: str, tokenizer_dir: Path, host: str, port: int, model_name: str, served_model_name: str,
    chat_template: Path | None, metrics_url: str, shutdown_timeout_s: float, api_key_file: Path | None,
    api_keys: tuple[str, ...], allow_no_key: bool, tls_cert: Path | None, tls_key: Path | None, max_requests: int,
) -> None:  # fmt: skip
    """Serve OpenAI's HTTP API, and a page to chat with, in front of a Triton server."""
    options = FrontEndOptions(
        url=url, tokenizer_dir=tokenizer_dir, host=host, port=port, model_name=model_name,
        served_model_name=served_model_name, chat_template=chat_template, metrics_url=metrics_url,
        shutdown_timeout_s=shutdown_timeout_s, api_keys=_all_keys(api_keys, api_key_file), allow_no_key=allow_no_key,
        tls_cert=tls_cert, tls_key=tls_key, max_requests=max_requests,
    )  # fmt: skip
    try:
        from pt_trtllm.openai.server import serve
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is not installed; the front end needs: pip install 'pt-trtllm[serve]'"
        ) from None
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    serve(options, lambda address: click.echo(f"playground at {address}, API at {address}/v1", err=True))


def _all_keys(given: tuple[str, ...], file: Path | None) -> tuple[str, ...]:
    listed = read_key_file(file) if file is not None else ()
    if file is not None and not is_private(file):
        click.echo(f"{file}: other users can read the API keys; chmod 600 keeps them private", err=True)
    return (*given, *listed, *env.API_KEYS.get().split())
