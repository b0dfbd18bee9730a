"""Builds one rank's engine in a process of its own: `python -m pt_trtllm.engine.tensorrt.worker < JOB`.

The job is one JSON object. Standard output carries JSON lines: `progress`, then `done` or `error`; what TensorRT and
its compiler print goes to standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from pt_trtllm.checkpoint.artifact import read_manifest
from pt_trtllm.checkpoint.rank_files import KIND
from pt_trtllm.engine.bundle import EngineConfig
from pt_trtllm.engine.tensorrt.library import Library, load_library
from pt_trtllm.engine.tensorrt.memory_watch import MemoryWatch
from pt_trtllm.engine.tensorrt.messages import Messages, make_logger, make_monitor
from pt_trtllm.engine.tensorrt.network import RankNetwork, build_network
from pt_trtllm.engine.tensorrt.settings import TensorrtSettings
from pt_trtllm.engine.tensorrt.weights import MappedWeights
from pt_trtllm.errors import EngineError, PtError


def build_rank(job: dict[str, Any], report: TextIO) -> dict[str, Any]:
    """Writes the engine file of a job; returns what is worth knowing about it."""
    config = EngineConfig.from_json(job["config"], "job")
    settings = TensorrtSettings.from_json(job["config"]["backend_config"], "job")
    library, rank, output = load_library(settings.library), int(job["rank"]), Path(job["output"])
    checkpoint_dir = Path(job["checkpoint_dir"])
    messages = Messages(lambda text: print(f"TensorRT warning: {text}", file=sys.stderr))
    builder = library.module.Builder(make_logger(library, messages))
    weights = MappedWeights(checkpoint_dir, config.checkpoint, read_manifest(checkpoint_dir, KIND), rank)
    network = build_network(builder, library, config, weights, rank, context_logits=settings.gather_context_logits)
    builder_config = configure(builder, library, settings, network, config.checkpoint.dtype)
    memory = MemoryWatch()
    monitor = make_monitor(library, lambda share: print(json.dumps({"progress": share}), file=report, flush=True))
    if monitor is not None:
        builder_config.progress_monitor = monitor
    with timing_cache(library, builder_config, Path(job["timing_cache"])):
        written = serialize(library, builder, network.network, builder_config, output)
    if not written:
        raise EngineError(
            f"rank {rank}: {library.name} {library.version} could not build the engine: {messages.summary()}"
        )
    return {"layers": network.network.num_layers, "weight_bytes": weights.num_bytes, **memory.stop()}


def configure(builder: Any, library: Library, settings: TensorrtSettings, network: RankNetwork, dtype: str) -> Any:
    """Profiles and targets."""
    trt, config = library.module, builder.create_builder_config()
    for index in range(2):
        profile = builder.create_optimization_profile()
        for binding in network.bindings:
            if binding.is_input:
                profile.set_shape(binding.name, *binding.shapes(index))
        config.add_optimization_profile(profile)
    if dtype == "float32":
        config.clear_flag(trt.BuilderFlag.TF32)  # who asks for float32 wants its digits
    if library.targets:
        config.num_compute_capabilities = len(settings.targets)
        for index, target in enumerate(settings.targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    return config


def serialize(library: Library, builder: Any, network: Any, config: Any, output: Path) -> bool:
    """Builds the engine straight into a file: a second copy of the weights is never in memory."""
    with output.open("wb", buffering=0) as file:

        class Writer(library.module.IStreamWriter):  # type: ignore[misc, name-defined]
            def write(self, data: bytes) -> int:
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
                return len(data)

        writer = Writer()
        library.module.IStreamWriter.__init__(writer)
        built = bool(builder.build_serialized_network_to_stream(network, config, writer))
        os.fsync(file.fileno())
    return built


@contextlib.contextmanager
def timing_cache(library: Library, config: Any, path: Path) -> Any:
    """Keeps what full TensorRT measured for the next build. TensorRT-RTX measures nothing at build time."""
    if library.name != "tensorrt":
        yield
        return
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    yield
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(config.get_timing_cache().serialize())
    temporary.replace(path)


def main() -> None:
    # Libraries print to file descriptor 1 whatever they like: the reports keep the real one.
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        answer: dict[str, Any] = {"done": build_rank(json.load(sys.stdin), report)}
    except PtError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), file=report, flush=True)


if __name__ == "__main__":
    main()
