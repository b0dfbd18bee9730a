"""`pt-trtllm client`"""

from __future__ import annotations

import json
from typing import Any

import click

from pt_trtllm.cli.requests import parse_json
from pt_trtllm.cli.sampling import sampling_options, sampling_params
from pt_trtllm.errors import ConfigError
from pt_trtllm.openai.options import is_address


@click.command("client")
@click.option("--url", default="127.0.0.1:8001", show_default=True, metavar="HOST:PORT", help="The server's gRPC port.")
@click.option("--prompt", help="Text to continue.")
@click.option("--input-ids", help="Instead: token ids as JSON, [1,2,3].")
@click.option("--model", default="ensemble", show_default=True, help="Model that takes texts.")
@click.option("--max-tokens", "--max-new-tokens", type=int, default=64, show_default=True)
@click.option("--no-stream", is_flag=True, help="Print the answer when it is complete.")
@click.option("--timeout-s", type=float, help="End the answer after this time.")
@sampling_options
@click.option("--ssl", is_flag=True, help="Connect with TLS.")
@click.option("--ssl-root-certificates", type=click.Path(exists=True, dir_okay=False), help="To check the server with.")
def command(
    url: str, prompt: str | None, input_ids: str | None, model: str, max_tokens: int, no_stream: bool,
    timeout_s: float | None, ssl: bool, ssl_root_certificates: str | None, **sampling: Any,
) -> None:  # fmt: skip
    """Ask a served model, and print the answer as it comes."""
    asked = _prompt(prompt, input_ids)
    params = sampling_params(max_tokens, sampling)
    if not is_address(url):
        raise ConfigError(f"--url is {url!r}, expected HOST:PORT of the server's gRPC endpoint, as 127.0.0.1:8001")
    try:
        from pt_trtllm.serving.client import Client
    except ImportError as error:
        raise ConfigError(f"client needs {error.name}; install it with: pip install 'pt-trtllm[serve]'") from None
    with Client(url, model=model, ssl=ssl, root_certificates=ssl_root_certificates) as client:
        if no_stream:
            answer = client.generate(asked, params, timeout_s=timeout_s)
            click.echo(answer.text if isinstance(asked, str) else json.dumps(answer.token_ids))
            return
        for chunk in client.stream(asked, params, timeout_s=timeout_s):
            click.echo(chunk.text if isinstance(asked, str) else "".join(f"{t} " for t in chunk.token_ids), nl=False)
        click.echo()


def _prompt(prompt: str | None, input_ids: str | None) -> str | list[int]:
    if (prompt is None) == (input_ids is None):
        raise ConfigError("give either --prompt or --input-ids")
    if prompt is not None:
        return prompt
    assert input_ids is not None
    ids = parse_json(input_ids, "--input-ids")
    if isinstance(ids, list) and len(ids) == 1 and isinstance(ids[0], list):
        ids = ids[0]
    if not (isinstance(ids, list) and ids and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)):
        raise ConfigError("--input-ids: expected a list of token ids, as [1,2,3]")
    return ids
