"""Option types and helpers that several commands share."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import click

from pt_trtllm.checkpoint.artifact import check_writable
from pt_trtllm.errors import ConfigError

FOLDER = click.Path(file_okay=False, path_type=Path)
EXISTING_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


class NameChoice(click.Choice[str]):
    """Shows names as they are written everywhere else, with underscores; takes both spellings."""

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:
        return f"[{'|'.join(self.choices)}]"

    def get_invalid_choice_message(self, value: object, ctx: click.Context | None) -> str:
        return f"{value!r} is not one of {', '.join(map(repr, self.choices))}."


def byte_size(value: str) -> int:
    """A number of bytes as Hugging Face writes it: 5GB (10^9), 512MiB (2^20), or digits alone."""
    match = re.fullmatch(r"(\d{1,18})\s*(?:([KMGT])(I?))?B?", value.strip().upper(), re.ASCII)
    size = int(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " ") if match else 0
    if not size:
        raise click.BadParameter(f"{value!r} is no size, expected a number of bytes such as 5GB, 512MiB or 100000.")
    return size


def check_outputs(files: Mapping[str, Path | None]) -> None:
    """option -> the file it writes. Raises, before any work, when one cannot be written or two are the same file."""
    option_of: dict[Path, str] = {}
    for option, path in files.items():
        if path is None:
            continue
        check_writable(path)
        other = option_of.setdefault(path.resolve(), option)
        if other != option:
            raise ConfigError(f"{other} and {option} both write {path}; give each a file of its own")


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr when it is a terminal; silence otherwise. Yields `report(done, total)`."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    with click.progressbar(length=1, label=label, file=sys.stderr) as bar:

        def report(done: int, total: int) -> None:
            bar.length = max(total, 1)
            bar.update(done - bar.pos)

        yield report
