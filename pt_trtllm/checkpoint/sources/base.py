"""What a checkpoint source provides: the model's configuration, and every logical tensor as blocks of rows."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from pt_trtllm.checkpoint.artifact import is_file, read_json
from pt_trtllm.checkpoint.safetensors_io import SafetensorsReader
from pt_trtllm.checkpoint.spec import TensorSpec
from pt_trtllm.config import ModelConfig, shown
from pt_trtllm.errors import CheckpointError

BLOCK_BYTES = 64 << 20
SOURCE_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
"""What lies beside the weights: tokenizer, chat template, generation settings."""


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a logical tensor, found in one tensor of the source."""

    source_name: str
    rows: int
    leading: tuple[int, ...] = ()
    """Indices (track, expert) into the source tensor's first axes."""
    transposed: bool = False
    """The source stores [in, out]."""


@dataclass(frozen=True)
class SourceLayout:
    """How one format spells a model: where each logical tensor is, and what else may lie in the file."""

    config: ModelConfig
    separate_head: bool
    locate: Callable[[TensorSpec, int], Sequence[Part]]
    """(spec, track) -> its parts, from the first row to the last."""
    leading_sizes: Callable[[str], tuple[int, ...]] = lambda name: ()
    """Sizes of the axes of a source tensor that `Part.leading` indexes."""
    ignored: Callable[[str], bool] = lambda name: False
    """Source tensors that carry no weights (rotary tables and the like)."""


class TensorStore(Protocol):
    """Random access to the tensors of a source folder."""

    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def names(self) -> set[str]: ...
    def read_rows(self, name: str, first: int, count: int, leading: tuple[int, ...]) -> torch.Tensor: ...


class SafetensorsStore:
    """One or several safetensors files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._readers: dict[str, SafetensorsReader] = {}
        for path in paths:
            reader = SafetensorsReader(path)
            twice = sorted(self._readers.keys() & reader.tensors.keys())
            if twice:
                raise CheckpointError(f"{path}: {twice[:3]} are also in {self._readers[twice[0]].path}")
            self._readers.update(dict.fromkeys(reader.tensors, reader))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._readers[name].tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._readers[name].tensors[name].dtype

    def names(self) -> set[str]:
        return set(self._readers)

    def read_rows(self, name: str, first: int, count: int, leading: tuple[int, ...]) -> torch.Tensor:
        return self._readers[name].read_rows(name, first, count, leading)


class TorchStore:
    """Pickled state dicts, loaded with `weights_only` (code in them is refused) and mapped, not read whole."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        for path in paths:
            self._tensors.update(_load_state_dict(path))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def names(self) -> set[str]:
        return set(self._tensors)

    def read_rows(self, name: str, first: int, count: int, leading: tuple[int, ...]) -> torch.Tensor:
        return self._tensors[name][leading][first : first + count]


def _load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many types; each means that the file is no plain state dict
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{path}: not a plain state dict of tensors: {reason[:200]}; save model.state_dict(), or safetensors"
        ) from None
    if isinstance(data, dict) and isinstance(data.get("state_dict"), dict):
        data = data["state_dict"]
    bad = [key for key, value in data.items() if not isinstance(value, torch.Tensor)] if isinstance(data, dict) else []
    if not isinstance(data, dict) or bad:
        raise CheckpointError(f"{path}: holds {bad[:3] or type(data).__name__}, expected only named tensors")
    return data


def open_store(folder: Path) -> TensorStore:
    """Safetensors first, then pickled state dicts; each whole, or sharded with an index."""
    kinds: list[tuple[str, Callable[[Sequence[Path]], TensorStore]]] = [
        ("model.safetensors", SafetensorsStore),
        ("model.pt", TorchStore),
        ("pytorch_model.bin", TorchStore),
    ]
    for name, store in kinds:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return store(_shards(index))
        if (folder / name).is_file():
            return store([folder / name])
    names = ", ".join(name for name, _ in kinds)
    raise CheckpointError(f"{folder}: no weights found; expected one of {names}, or its .index.json with shards")


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index, "an index of shards").get("weight_map")
    named = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not all(isinstance(name, str) and Path(name).name == name for name in named):
        raise CheckpointError(f"{index}: weight_map must give the name of a file in this folder for every tensor")
    shards = sorted(set(named))
    absent = [shown(name) for name in shards if not is_file(index.parent / name)]
    if absent or not shards:
        raise CheckpointError(f"{index}: names shards that are missing: {absent}; copy the folder again")
    return [index.parent / name for name in shards]


def head_differs(store: TensorStore, embedding: str, head: str) -> bool:
    """Whether a model that says its head is the embedding brings another one: that must not be dropped silently."""
    if head not in store.names() or embedding not in store.names():
        return False
    rows, step = store.shape(head)[0], 4096
    if store.shape(head) != store.shape(embedding):
        return True
    return any(
        not torch.equal(*(store.read_rows(name, first, min(step, rows - first), ()) for name in (head, embedding)))
        for first in range(0, rows, step)
    )


class Source:
    """A checked source: all expected tensors are there with the right shapes, and no unknown ones."""

    def __init__(self, folder: Path, layout: SourceLayout, store: TensorStore, specs: Sequence[TensorSpec]) -> None:
        self.folder, self.layout, self.config = folder, layout, layout.config
        self._store = store
        self._check(specs)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the bulk of the weights."""
        names = sorted(self._store.names(), key=lambda name: (-torch.Size(self._store.shape(name)).numel(), name))
        return self._store.dtype(names[0])

    def blocks(self, spec: TensorSpec, track_idx: int) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows [count, columns]) of one track's tensor, from top to bottom."""
        row = 0
        for part in self.layout.locate(spec, track_idx):
            if part.transposed:
                matrix = self._store.read_rows(part.source_name, 0, spec.columns, part.leading).t()
                for first in range(0, part.rows, _rows_per_block(matrix)):
                    block = matrix[first : first + _rows_per_block(matrix)].contiguous()
                    yield row + first, self._finite(block, part, first)
            else:
                itemsize = self._store.dtype(part.source_name).itemsize
                step = max(1, BLOCK_BYTES // max(1, spec.columns * itemsize))
                for first in range(0, part.rows, step):
                    count = min(step, part.rows - first)
                    block = self._store.read_rows(part.source_name, first, count, part.leading)
                    yield row + first, self._finite(block.reshape(count, spec.columns), part, first)
            row += part.rows

    @property
    def has_tokenizer(self) -> bool:
        return any(path.name.startswith(("tokenizer.", "vocab.")) for path in self._companions())

    def copy_companions(self, folder: Path) -> None:
        """Copies tokenizer, chat template and generation settings, whichever there are."""
        folder.mkdir(exist_ok=True)
        for path in self._companions():
            shutil.copyfile(path, folder / path.name)

    def _companions(self) -> list[Path]:
        return [self.folder / name for name in COMPANIONS if (self.folder / name).is_file()]

    def _finite(self, block: torch.Tensor, part: Part, first_row: int) -> torch.Tensor:
        # A sum is several times faster than looking at every element; it is finite only if all of them are.
        if torch.isfinite(block.sum()):
            return block
        finite = torch.isfinite(block)
        if not finite.all():
            row, column = (int(index) for index in (~finite).nonzero()[0])
            raise CheckpointError(
                f"{self.folder}: {part.source_name} holds {block[row, column].item()} "
                f"(index {[*part.leading, first_row + row, column]}); the weights are damaged, export them again"
            )
        return block

    def _check(self, specs: Sequence[TensorSpec]) -> None:
        found, expected, problems = self._store.names(), set(), []
        for spec in specs:
            for track_idx in range(self.config.num_tracks if spec.per_track else 1):
                for part in self.layout.locate(spec, track_idx):
                    name = part.source_name
                    if name not in found:
                        if name not in expected:
                            problems.append(f"{name} is missing")
                    elif (
                        self._store.shape(name) != (shape := self._expected_shape(spec, part)) and name not in expected
                    ):
                        problems.append(f"{name} has shape {list(self._store.shape(name))}, expected {list(shape)}")
                    elif self._store.dtype(name) not in SOURCE_TYPES and name not in expected:
                        wanted = "expected floating point of 16 bits or more: give the unquantised checkpoint"
                        problems.append(f"{name} has type {self._store.dtype(name)}, {wanted}")
                    expected.add(name)
        problems += [f"{name} is unexpected" for name in sorted(found - expected) if not self.layout.ignored(name)]
        if problems:
            more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
            raise CheckpointError(f"{self.folder}: weights do not match config.json: {'; '.join(problems[:8])}{more}")

    def _expected_shape(self, spec: TensorSpec, part: Part) -> tuple[int, ...]:
        return (*self.layout.leading_sizes(part.source_name), *part_shape(spec, part))


def part_shape(spec: TensorSpec, part: Part) -> tuple[int, ...]:
    """The shape in which a format stores these rows, below the axes that `Part.leading` indexes."""
    if len(spec.shape) == 1:
        return (part.rows,)
    return (spec.columns, part.rows) if part.transposed else (part.rows, spec.columns)


def _rows_per_block(matrix: torch.Tensor) -> int:
    return max(1, BLOCK_BYTES // max(1, matrix.shape[1] * matrix.dtype.itemsize))
