"""`pt-trtllm serve`"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import click

from pt_trtllm.cli.options import EXISTING_FILE, EXISTING_FOLDER, FILE
from pt_trtllm.errors import ServingError
from pt_trtllm.serving.server import TritonServer
from pt_trtllm.serving.server_options import ServerOptions

DEFAULTS = ServerOptions()
CHECK_PERIOD_S = 1.0


@click.command("serve")
@click.option("--model-repository", required=True, type=EXISTING_FOLDER, help="Output of `pt-trtllm deploy`.")
@click.option("--host", default=DEFAULTS.host, show_default=True, help="Address to listen on.")
@click.option("--grpc-port", type=int, default=DEFAULTS.grpc_port, show_default=True, help="0 takes a free one.")
@click.option("--http-port", type=int, default=DEFAULTS.http_port, show_default=True, help="0 takes a free one.")
@click.option("--metrics-port", type=int, default=DEFAULTS.metrics_port, show_default=True, help="0 takes a free one.")
@click.option(
    "--tritonserver", type=EXISTING_FILE, help="Server to run.  [default: the system's, else the embedded one]"
)
@click.option("--log-file", type=FILE, help="Append the server's log here.")
@click.option(
    "--load-timeout-s", type=float, default=DEFAULTS.load_timeout_s, show_default=True, help="Longest wait for models."
)
@click.option(
    "--exit-timeout-s", type=int, default=DEFAULTS.exit_timeout_s, show_default=True,
    help="When stopped, the time for requests in flight to end.",
)  # fmt: skip
@click.argument("extra", nargs=-1, type=click.UNPROCESSED, metavar="[-- TRITONSERVER_OPTION...]")
def command(model_repository: Path, extra: tuple[str, ...], **options: Any) -> int:
    """Run tritonserver on a model repository until it is told to stop.

    Options behind -- go to tritonserver as they are, for TLS, metrics or tracing: -- --grpc-use-ssl=true ...
    """
    with TritonServer(model_repository, ServerOptions(extra=extra, **options)) as server:
        click.echo(f"ready: gRPC {server.grpc_url}, HTTP {server.http_url}, metrics {server.metrics_url}")
        try:
            while server.poll() is None:
                time.sleep(CHECK_PERIOD_S)
                server.take_in_orphans()
                if lost := server.lost_process():
                    last_lines = server.log_tail()
                    server.close(exit_timeout_s=0.0)
                    raise ServingError(f"the {lost}, which Triton cannot mend, so the server was ended; start it "
                                       f"again. Last lines of its log:\n{last_lines}")  # fmt: skip
        except KeyboardInterrupt:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # it is ending already
            click.echo("stopping: requests in flight may end", err=True)
            return 0
        raise ServingError(f"tritonserver ended with {server.poll()}; last lines of its log:\n{server.log_tail()}")
