"""What an engine is built with: package, targets, profiles and tensors; `backend_config` of its config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pt_trtllm.engine.tensorrt.bindings import PROFILES, Binding
from pt_trtllm.engine.tensorrt.gpu import Gpu
from pt_trtllm.engine.tensorrt.library import PACKAGES, Library, load_library
from pt_trtllm.errors import ConfigError, EngineError

FIRST_FP8_TARGET = 89


@dataclass(frozen=True, kw_only=True)
class TensorrtSettings:
    library: str
    """tensorrt or tensorrt_rtx"""
    version: str
    targets: tuple[str, ...]
    """Compute capabilities one engine file runs on."""
    gather_context_logits: bool = False
    """Whether a chunk of a prompt may ask for the logits of all its tokens."""

    def to_json(self, table: Sequence[Binding]) -> dict[str, Any]:
        """Adds the tensors, for readers: they follow from the model and the limits."""
        return {**dataclasses.asdict(self), "targets": list(self.targets), "profiles": list(PROFILES),
                "tensors": [_describe(binding) for binding in table]}  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any], where: str) -> TensorrtSettings:
        try:
            values = {field.name: data[field.name] for field in dataclasses.fields(cls)}
            return cls(**{**values, "targets": tuple(values["targets"])})
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{where}: no TensorRT settings in it: {error!r}; build the engine again") from None

    def check_version(self) -> Library:
        """The package that can load this engine; raises where another version is installed."""
        library = load_library(self.library)
        if library.version != self.version:
            raise EngineError(
                f"the engine was built with {self.library} {self.version}, this machine has {library.version}; "
                "TensorRT engines load only in the version that built them: install it, or build again here"
            )
        return library

    def check_gpu(self, gpu: Gpu | None) -> Gpu:
        """Raises where this machine's GPU cannot run the engine."""
        if gpu is None:
            raise EngineError(
                "TensorRT engines run on NVIDIA GPUs; the driver shows none here: run on a machine with one, "
                "or build with --backend cpu"
            )
        if gpu.target not in self.targets:
            raise EngineError(
                f"the engine was built for {', '.join(self.targets)}, this machine's GPU is {gpu.target}; "
                f"build again with --target {gpu.target}"
            )
        return gpu


def choose_library(targets: Sequence[str], gpu: Gpu | None) -> tuple[Library, tuple[str, ...]]:
    """A package that can build for these targets, and the targets: without any, this machine's GPU."""
    wanted = tuple(dict.fromkeys(targets)) or ((gpu.target,) if gpu else ())
    if not wanted:
        raise EngineError("no GPU here to build for: name the ones that will run the engine, like --target sm89,sm120")
    bad = [target for target in wanted if not (target.startswith("sm") and target[2:].isdigit())]
    if bad:
        raise ConfigError(f"--target is {','.join(bad)}, expected compute capabilities like sm89 or sm120")
    problems, libraries = [], []
    for name in PACKAGES:
        try:
            libraries.append(load_library(name))
        except EngineError:
            continue
    if not libraries:
        load_library()  # raises, with the line that installs one
    for library in libraries:
        unsupported = [target for target in wanted if target not in _possible(library, gpu)]
        if not unsupported:
            return library, wanted
        possible = ", ".join(_possible(library, gpu)) or "only the GPU that is present, and there is none"
        problems.append(
            f"{library.name} {library.version} cannot build for {', '.join(unsupported)} (it can: {possible})"
        )
    raise EngineError(
        f"--target {','.join(wanted)}: {'; '.join(problems)}. Other GPUs, like sm90 and sm100, need full TensorRT on a "
        "machine that has one: pip install 'pt-trtllm[tensorrt]'"
    )


def check_fp8(targets: Sequence[str]) -> None:
    """Raises where a target has no float8."""
    without = [target for target in targets if int(target.removeprefix("sm")) < FIRST_FP8_TARGET]
    if without:
        raise EngineError(
            f"the checkpoint's weights are fp8 (e4m3), which {', '.join(without)} does not have: it begins with "
            f"sm{FIRST_FP8_TARGET}; leave it out of --target, or convert with --quantization int8_wo"
        )


def _possible(library: Library, gpu: Gpu | None) -> tuple[str, ...]:
    """Full TensorRT builds for the GPU it runs on."""
    if library.name == "tensorrt":
        return (gpu.target,) if gpu else ()
    return library.targets


def _describe(binding: Binding) -> dict[str, Any]:
    axes = {name: [list(axis) for axis in binding.profiles[index]] for index, name in enumerate(PROFILES)}
    entry: dict[str, Any] = {"name": binding.name, "dtype": binding.dtype,
                             "mode": "input" if binding.is_input else "output", **axes}  # fmt: skip
    return entry if binding.aliases is None else {**entry, "aliases": binding.aliases}
