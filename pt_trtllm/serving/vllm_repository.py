"""`deploy --backend vllm`: a model repository for Triton's vLLM backend, written whole or not at all."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pt_trtllm.checkpoint.artifact import new_folder, read_json, write_json, write_manifest
from pt_trtllm.checkpoint.rank_files import ARCHITECTURE
from pt_trtllm.checkpoint.sources import open_source
from pt_trtllm.checkpoint.sources.pt import recognises
from pt_trtllm.config import ModelConfig, problems_to_error
from pt_trtllm.errors import ConfigError
from pt_trtllm.runtime.tokenizer import Tokenizer
from pt_trtllm.serving.repository import KIND
from pt_trtllm.vllm.refusals import mapping_of

BACKEND = "vllm"
MODEL_NAME = "vllm_model"
"""What the examples of Triton's vLLM backend call it."""
ENGINE_ARGS = "model.json"
EXECUTORS = ("mp", "ray")
PLACES = ("model", "tokenizer")
"""Engine arguments that name folders; `deploy` has checked those it writes."""


@dataclass(frozen=True, kw_only=True)
class VllmOptions:
    """What vLLM's engine is told, by the names of `vllm serve`. None leaves it to vLLM."""

    tensor_parallel_size: int = 1
    distributed_executor_backend: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    kv_cache_dtype: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float | None = None
    enable_prefix_caching: bool | None = None
    enforce_eager: bool | None = None
    additional_config: dict[str, Any] | None = None
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Any further arguments of vLLM's AsyncEngineArgs."""
    model_name: str = MODEL_NAME
    served_model_dir: Path | None = None
    """Where the server sees the checkpoint, if not where it is now: in a container, for instance. vLLM takes relative
    paths from where the server was started."""
    report_custom_metrics: bool = False
    """vLLM's own metrics at Triton's metrics port."""
    force: bool = False

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value}, expected at least 1"
            for name in ("tensor_parallel_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        if self.gpu_memory_utilization is not None and not 0 < self.gpu_memory_utilization <= 1:
            problems.append(f"gpu_memory_utilization is {self.gpu_memory_utilization}, expected above 0, at most 1")
        if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", self.model_name, re.ASCII):
            problems.append(f"model_name is {self.model_name!r}, expected a folder's name: letters, digits, _ . -")
        if self.served_model_dir is not None and not self.served_model_dir.is_absolute():
            problems.append(f"served_model_dir is {str(self.served_model_dir)!r}, expected an absolute path")
        own = sorted(self.engine_args.keys() & {*ENGINE_OPTIONS, *PLACES})
        if own:
            problems.append(f"engine_args has {', '.join(own)}; the options of the same name say that")
        problems_to_error("deploy options", problems)


ENGINE_OPTIONS = (
    "tensor_parallel_size", "distributed_executor_backend", "dtype", "quantization", "kv_cache_dtype", "max_model_len",
    "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization", "enable_prefix_caching", "enforce_eager",
    "additional_config",
)  # fmt: skip
"""Options that reach vLLM's engine under their own names."""


def deploy_vllm(model_dir: Path, tokenizer_dir: Path | None, target: Path, options: VllmOptions) -> None:
    """Writes the repository. Checkpoint and tokenizer stay where they are; the repository names them."""
    try:
        from pt_trtllm.serving import model_config as configs
    except ImportError as error:
        raise ConfigError(f"deploy needs {error.name}; install it with: pip install 'pt-trtllm[serve]'") from None
    model_dir = model_dir.resolve()
    tokenizer_dir = tokenizer_dir.resolve() if tokenizer_dir else model_dir
    args = engine_args(model_dir, tokenizer_dir, options)
    _check_model(model_dir, args)
    Tokenizer(tokenizer_dir)
    parameters = {"REPORT_CUSTOM_METRICS": "true"} if options.report_custom_metrics else {}
    with new_folder(target, source=model_dir, force=options.force) as work:
        (work / options.model_name / "1").mkdir(parents=True)
        config = configs.vllm_model(options.model_name, parameters=parameters)
        (work / options.model_name / "config.pbtxt").write_text(configs.to_text(config))
        write_json(work / options.model_name / "1" / ENGINE_ARGS, args)
        details = {"backend": BACKEND, "model_dir": str(model_dir), "tokenizer_dir": str(tokenizer_dir)}
        write_manifest(work, KIND, details)


def engine_args(model_dir: Path, tokenizer_dir: Path, options: VllmOptions) -> dict[str, Any]:
    """What the backend gives to vLLM's AsyncEngineArgs: only what was decided, so that vLLM's defaults stay its own."""
    decided = {name: value for name in ENGINE_OPTIONS if (value := getattr(options, name)) is not None}
    tokenizer = {} if tokenizer_dir == model_dir else {"tokenizer": str(tokenizer_dir)}
    return {"model": str(options.served_model_dir or model_dir), **tokenizer, **decided, **options.engine_args}


def _check_model(folder: Path, args: Mapping[str, Any]) -> None:
    """Raises for what vLLM would refuse, or not find, once the server starts."""
    path = folder / "config.json"
    raw = read_json(path, "a checkpoint of the pt layout")
    named = raw.get("architectures", [ARCHITECTURE])
    model = _model(folder, raw)
    if named != [ARCHITECTURE]:
        raise ConfigError(f"{path}: architectures is {named!r}, expected {[ARCHITECTURE]!r}: by it vLLM finds the "
                          "model class of pt-trtllm's plugin")  # fmt: skip
    mapping_of(model, _as_vllm_config(args), rank=0)
    asked, longest = args.get("max_model_len"), model.max_position_embeddings
    if asked is not None and asked > longest:
        raise ConfigError(f"max_model_len is {asked}, but {folder} has {longest} positions")


def _model(folder: Path, raw: dict[str, Any]) -> ModelConfig:
    """Checks the tensors too, but for quantised ones, which vLLM alone knows."""
    if raw.get("quantization_config") is None or not recognises(raw):
        return open_source(folder, "pt").config
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    return ModelConfig.from_dict({name: value for name, value in raw.items() if name in known})


def _as_vllm_config(args: Mapping[str, Any]) -> SimpleNamespace:
    """What the plugin's own refusals read, as vLLM would make it of these arguments."""
    speculative = args.get("speculative_config")
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**{name: value for name, value in args.items() if isinstance(value, int)}),
        speculative_config=SimpleNamespace(method=speculative.get("method")) if isinstance(speculative, dict) else None,
        lora_config=args.get("enable_lora") or None,
        quant_config=None,
        compilation_config=SimpleNamespace(pass_config=None),
        additional_config=args.get("additional_config") or {},
    )
