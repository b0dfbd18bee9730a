"""A batch of requests as files, for ranks that many tests share."""

from __future__ import annotations

import json
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pt_trtllm.checkpoint.safetensors_io import DeclaredTensor, SafetensorsReader, SafetensorsWriter
from pt_trtllm.runtime.core import EngineStats
from pt_trtllm.runtime.protocol import request_from_json, request_to_json
from pt_trtllm.runtime.request import Request, Sequence


@dataclass(frozen=True, kw_only=True)
class Job:
    requests: tuple[Request, ...]

    def write(self, folder: Path) -> None:
        data = {"requests": [request_to_json(request) for request in self.requests]}
        (folder / "job.json").write_text(json.dumps(data))

    @classmethod
    def read(cls, folder: Path) -> Job:
        data = json.loads((folder / "job.json").read_text())
        return cls(requests=tuple(request_from_json(request) for request in data["requests"]))

    @staticmethod
    def write_results(folder: Path, sequences: SequenceABC[Sequence], stats: EngineStats) -> None:
        outputs = [{"output_ids": s.output_ids, "finish_reason": s.finish_reason} for s in sequences]
        write_context_logits(folder / "context_logits.safetensors", sequences)
        (folder / "results.json").write_text(json.dumps({"outputs": outputs, "stats": stats.to_json()}))

    @staticmethod
    def read_results(folder: Path) -> dict[str, Any]:
        results: dict[str, Any] = json.loads((folder / "results.json").read_text())
        return results


def write_context_logits(path: Path, sequences: SequenceABC[Sequence]) -> None:
    """One float32 tensor [prompt tokens, vocabulary] per sequence that asked, named by its index."""
    wanted = [sequence for sequence in sequences if sequence.prompt_logits]
    if not wanted:
        return
    shapes = {s.index: (len(s.prompt_logits), len(s.prompt_logits[0])) for s in wanted}
    declared = [DeclaredTensor(str(index), torch.float32, shape) for index, shape in shapes.items()]
    with SafetensorsWriter(path, declared) as writer:
        for sequence in wanted:
            for row, logits in enumerate(sequence.prompt_logits):
                writer.write(str(sequence.index), logits, row * len(logits))


def read_context_logits(path: Path) -> dict[str, torch.Tensor]:
    reader = SafetensorsReader(path)
    try:
        return {name: reader.read(name) for name in reader.tensors}
    finally:
        reader.close()
