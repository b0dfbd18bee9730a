"""Every environment variable this project reads, in one place; docs/environment.md is tested against it.

The instruction sets are read by the C++ libraries themselves.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pt_trtllm.errors import ConfigError


@dataclass(frozen=True)
class Variable:
    name: str
    default: str
    parse: Callable[[str], Any]
    expected: str
    meaning: str

    def get(self) -> Any:
        """The parsed value; a malformed one is an error, never ignored."""
        text = os.environ.get(self.name, self.default)
        try:
            return self.parse(text)
        except ValueError:
            raise ConfigError(f"{self.name} is {text!r}, expected {self.expected}") from None


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value


def _choice(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(text)
        return text

    return parse


PLUGIN_LIBRARY = Variable(
    "PT_PLUGIN_LIBRARY", "", str, "a path", "Shared library of the track-fusion plugin, instead of the installed one."
)
TRACK_FUSION_ISA = Variable(
    "PT_TRACK_FUSION_ISA",
    "",
    _choice("", "baseline", "avx2", "avx512"),
    "baseline, avx2, avx512 or nothing",
    "Instruction set of the CPU collectives; empty takes the best this processor has. Results are bit-identical.",
)
CUDA_FUSION_LIBRARY = Variable(
    "PT_CUDA_FUSION_LIBRARY", "", str, "a path", "Shared library of GPU track fusion, instead of the installed one."
)
KERNELS_LIBRARY = Variable(
    "PT_KERNELS_LIBRARY", "", str, "a path", "Shared library of the matrix kernels, instead of the installed one."
)
ATTENTION_LIBRARY = Variable(
    "PT_ATTENTION_LIBRARY", "", str, "a path", "Shared library of paged attention, instead of the installed one."
)
PROGRAM_LIBRARY = Variable(
    "PT_PROGRAM_LIBRARY",
    "",
    str,
    "a path",
    "Shared library that runs a step's kernels in one call, instead of the installed one.",
)
KERNELS_ISA = Variable(
    "PT_KERNELS_ISA",
    "",
    _choice("", "baseline", "avx2", "avx512"),
    "baseline, avx2, avx512 or nothing",
    "Instruction set of the matrix and attention kernels; empty takes the best this processor has.",
)
MPIRUN = Variable("PT_MPIRUN", "", str, "a path", "mpirun to launch ranks with, instead of the one found.")
LAUNCHER = Variable(
    "PT_LAUNCHER",
    "auto",
    _choice("auto", "mpirun", "srun"),
    "auto, mpirun or srun",
    "How ranks are started; auto takes srun inside a Slurm allocation of several nodes, mpirun otherwise.",
)
COMM_TIMEOUT_S = Variable(
    "PT_COMM_TIMEOUT_S", "60", _positive, "a number of seconds", "Longest wait for a peer in a collective of a step."
)
LOAD_TIMEOUT_S = Variable(
    "PT_LOAD_TIMEOUT_S", "900", _positive, "a number of seconds", "Longest wait for a peer that is loading its engine."
)
NUM_THREADS = Variable(
    "PT_NUM_THREADS", "0", _count, "a whole number", "Compute threads per rank; 0 shares the host's cores evenly."
)
CACHE_DIR = Variable(
    "PT_CACHE_DIR",
    "~/.cache/pt-trtllm",
    str,
    "a path",
    "Where TensorRT's timing and runtime caches are kept between runs.",
)
API_KEYS = Variable(
    "PT_API_KEYS", "", str, "text", "Keys of which clients of `openai` must send one, separated by blanks."
)
TRITON_CONTROL_DIR = Variable(
    "PT_TRITON_CONTROL_DIR", "", str, "a folder", "Set by `serve` for its models: where they and `serve` meet."
)
SHARED_MEMORY_DIR = Variable(
    "PT_SHARED_MEMORY_DIR",
    "",
    str,
    "a folder",
    "Set by `serve`: for Open MPI's shared memory of ranks on its own host.",
)

VARIABLES = (
    PLUGIN_LIBRARY,
    TRACK_FUSION_ISA,
    CUDA_FUSION_LIBRARY,
    KERNELS_LIBRARY,
    ATTENTION_LIBRARY,
    PROGRAM_LIBRARY,
    KERNELS_ISA,
    MPIRUN,
    LAUNCHER,
    COMM_TIMEOUT_S,
    LOAD_TIMEOUT_S,
    NUM_THREADS,
    CACHE_DIR,
    API_KEYS,
    TRITON_CONTROL_DIR,
    SHARED_MEMORY_DIR,
)
