"""`pt-trtllm`: one sub-command per file, imported when it is used."""

from __future__ import annotations

import difflib
import importlib
import signal
import sys

import click

from pt_trtllm import __version__
from pt_trtllm.errors import CommunicationError, PtError, ServingError

COMMANDS = {
    "convert": "Convert a checkpoint to per-rank weights (TensorRT-LLM's unified layout).",
    "build": "Build per-rank engines from a converted checkpoint.",
    "run": "Generate with an engine over MPI ranks.",
    "deploy": "Write a Triton model repository for an engine and a tokenizer.",
    "serve": "Run tritonserver on a model repository.",
    "client": "Ask a served model, and print the answer as it comes.",
    "openai": "Serve OpenAI's HTTP API, and a page to chat with, in front of a Triton server.",
    "bench": "Measure engines side by side: latency, throughput, collectives, memory bandwidth.",
    "export": "Write a checkpoint in our `pt` layout, which vLLM serves.",
    "inspect": "Show what a checkpoint or an engine holds, its mapping and sync plan.",
    "doctor": "Show what this machine has, and how to get the rest.",
}
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


class LazyGroup(click.Group):
    """Knows every command's name and summary; imports a command's module only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"pt_trtllm.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS)
            hint = f"Did you mean {near[0]!r}?" if near else f"The commands are {', '.join(COMMANDS)}."
            raise click.UsageError(f"No such command {args[0]!r}. {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


# TensorRT-LLM spells its options with underscores: both spellings work everywhere.
@click.group(
    cls=LazyGroup,
    context_settings={
        "token_normalize_func": lambda name: name.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
)
@click.version_option(__version__, prog_name="pt-trtllm")
def cli() -> None:
    """From a Parallel Track transformer checkpoint to a served endpoint."""


def main() -> None:
    """Runs the command line: bad input ends with one line and exit code 2, a failed run with 1."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)  # unwinds like Ctrl-C, so that ranks and files are cleared away
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        _fail(error.format_message(), BAD_INPUT)
    except PtError as error:
        _fail(str(error), FAILED if isinstance(error, (CommunicationError, ServingError)) else BAD_INPUT)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> None:
    click.echo(f"pt-trtllm: error: {' '.join(message.split())}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
