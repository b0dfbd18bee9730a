"""`deploy`: a model repository for an engine and a tokenizer, written whole or not at all."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from pt_trtllm.checkpoint.artifact import new_folder, read_json, write_manifest
from pt_trtllm.config import is_positive_int, problems_to_error
from pt_trtllm.engine.bundle import open_bundle
from pt_trtllm.errors import ConfigError, ServingError
from pt_trtllm.runtime.scheduler import POLICIES
from pt_trtllm.runtime.tokenizer import find_tokenizer
from pt_trtllm.serving.tensors import MAX_LENGTH

KIND = "model repository"
TENSORRT_LLM = "tensorrt-llm"


@dataclass(frozen=True, kw_only=True)
class DeployOptions:
    """How the models behave; the names of parameters are TensorRT-LLM's where it has one."""

    triton_max_batch_size: int = 64
    """Prompts of one request; not the engine's running batch."""
    max_queue_size: int = 256
    """Requests that may wait for a place in the batch; more are refused."""
    exclude_input_in_output: bool = True
    """Answers without the prompt, unless a request says otherwise."""
    max_tokens_in_paged_kv_cache: int = 0
    """0 decides by memory."""
    kv_cache_free_mem_fraction: float = 0.5
    enable_block_reuse: bool = True
    scheduler_policy: str = POLICIES[0]
    hostfile: Path | None = None
    preprocessing_instances: int = 1
    postprocessing_instances: int = 1
    bls_instances: int = 4
    """Requests that `tensorrt_llm_bls` answers at the same time; each is a process."""
    decoupled: bool = True
    """Without, every request has one response: for unary clients; nothing streams."""
    step_timeout_s: float = 60.0
    """An engine that makes no progress for so long while it has work is restarted."""
    force: bool = False

    def __post_init__(self) -> None:
        least = {
            "triton_max_batch_size": 1,
            "max_queue_size": 0,
            "max_tokens_in_paged_kv_cache": 0,
            "preprocessing_instances": 1,
            "postprocessing_instances": 1,
            "bls_instances": 1,
        }
        problems = [
            f"{name} is {getattr(self, name)}, expected at least {low}"
            for name, low in least.items()
            if getattr(self, name) < low
        ]
        if not 0 < self.step_timeout_s < float("inf"):
            problems.append(f"step_timeout_s is {self.step_timeout_s}, expected above 0")
        problems_to_error("deploy options", problems)


def deploy(engine_dir: Path, tokenizer_dir: Path | None, target: Path, options: DeployOptions) -> None:
    """Writes the repository. The engine and the tokenizer stay where they are; the repository names them."""
    engine_dir = engine_dir.resolve()
    is_tensorrt_llm = _is_tensorrt_llm(engine_dir)
    tokenizer_dir = _tokenizer_folder(engine_dir, tokenizer_dir)
    if options.hostfile is not None and not options.hostfile.is_file():
        raise ConfigError(f"{options.hostfile}: no such file; expected a hostfile for mpirun")
    with new_folder(target, source=engine_dir, force=options.force) as work:
        for model, config in _configs(engine_dir, tokenizer_dir, options, is_tensorrt_llm).items():
            shutil.copytree(template_folder() / model, work / model, ignore=shutil.ignore_patterns("__pycache__"))
            if model == "tensorrt_llm" and is_tensorrt_llm:
                (work / model / "1/model.py").unlink()
                (work / model / "1/placeholder.txt").write_text("The tensorrtllm backend reads gpt_model_path.\n")
            (work / model / "config.pbtxt").write_text(config)
        write_manifest(work, KIND, {"engine_dir": str(engine_dir), "tokenizer_dir": str(tokenizer_dir)})


def template_folder() -> Path:
    """`triton_repo/` of the source tree, or the copy that was installed with the package."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "serving" / "triton_repo", package.parent / "triton_repo"):
        if folder.is_dir():
            return folder
    raise ServingError(f"no triton_repo folder beside {package}; install pt-trtllm again")


def _configs(engine_dir: Path, tokenizer_dir: Path, options: DeployOptions, is_tensorrt_llm: bool) -> dict[str, str]:
    try:
        from pt_trtllm.serving import model_config as configs
    except ImportError as error:
        raise ConfigError(f"deploy needs {error.name}; install it with: pip install 'pt-trtllm[serve]'") from None
    batch, with_private = options.triton_max_batch_size, not is_tensorrt_llm
    text = {"tokenizer_dir": str(tokenizer_dir), "add_special_tokens": "true", "skip_special_tokens": "true"}
    tokens = _special_tokens(engine_dir)
    exclude = {"exclude_input_in_output": _flag(options.exclude_input_in_output)}
    core = {
        "max_batch_size": batch,
        "parameters": _core_parameters(engine_dir, tokenizer_dir, options),
        "decoupled": options.decoupled,
    }
    return {
        name: configs.to_text(config)
        for name, config in {
            "preprocessing": configs.preprocessing_model(
                max_batch_size=batch,
                parameters={**text, **tokens, **_max_input_len(engine_dir)},
                instances=options.preprocessing_instances,
            ),
            "tensorrt_llm": (
                configs.core_model(**core)  # type: ignore[arg-type]
                if with_private
                else configs.tensorrt_llm_core_model(**core, max_queue_size=options.max_queue_size)  # type: ignore[arg-type]
            ),
            "postprocessing": configs.postprocessing_model(
                max_batch_size=batch,
                parameters=text,
                instances=options.postprocessing_instances,
                with_private=with_private,
            ),
            "ensemble": configs.ensemble_model(
                max_batch_size=batch, with_private=with_private, decoupled=options.decoupled
            ),
            "tensorrt_llm_bls": configs.bls_model(
                max_batch_size=batch,
                parameters={**text, **exclude, "core_makes_text": _flag(with_private)},
                instances=options.bls_instances,
                with_private=with_private,
                decoupled=options.decoupled,
            ),
        }.items()
    }


def _core_parameters(engine_dir: Path, tokenizer_dir: Path, options: DeployOptions) -> dict[str, str]:
    parameters = {
        "gpt_model_path": str(engine_dir),
        "gpt_model_type": "inflight_fused_batching",
        MAX_LENGTH: str(_max_length(engine_dir)),
        "tokenizer_dir": str(tokenizer_dir),
        "batch_scheduler_policy": options.scheduler_policy,
        "enable_kv_cache_reuse": _flag(options.enable_block_reuse),
        "kv_cache_free_gpu_mem_fraction": str(options.kv_cache_free_mem_fraction),
        "exclude_input_in_output": _flag(options.exclude_input_in_output),
        "max_queue_size": str(options.max_queue_size),
        "cancellation_check_period_ms": "100",
        "stats_check_period_ms": "1000",
        "step_timeout_s": str(options.step_timeout_s),
    }
    if options.max_tokens_in_paged_kv_cache:
        parameters["max_tokens_in_paged_kv_cache"] = str(options.max_tokens_in_paged_kv_cache)
    if options.hostfile is not None:
        parameters["hostfile"] = str(options.hostfile.resolve())
    return parameters


def _max_length(engine_dir: Path) -> int:
    """0 where the engine does not say."""
    config = read_json(engine_dir / "config.json", "an engine")
    length = (config.get("build_config") or {}).get("max_seq_len")
    return length if isinstance(length, int) else 0


def _special_tokens(engine_dir: Path) -> dict[str, str]:
    """`end_id` and `pad_id` of requests that name none."""
    pretrained = read_json(engine_dir / "config.json", "an engine").get("pretrained_config", {})
    model = pretrained.get("pt", {}).get("model", pretrained)
    end, pad = model.get("eos_token_id"), model.get("pad_token_id")
    end = end[0] if isinstance(end, list) and end else end
    ids = {"end_id": end, "pad_id": end if pad is None else pad}
    return {name: str(token) for name, token in ids.items() if isinstance(token, int)}


def _max_input_len(engine_dir: Path) -> dict[str, str]:
    """Tokens of the longest prompt, as far as the engine says."""
    config = read_json(engine_dir / "config.json", "an engine")
    limits = config.get("limits", config.get("build_config"))
    longest = limits.get("max_input_len") if isinstance(limits, dict) else None
    return {"max_input_len": str(longest)} if is_positive_int(longest) else {}


def _is_tensorrt_llm(engine_dir: Path) -> bool:
    """Whether Triton's own backend runs it. Those engines say so in `config.json`."""
    if read_json(engine_dir / "config.json", "an engine written by `pt-trtllm build`").get("backend") == TENSORRT_LLM:
        return True
    open_bundle(engine_dir)
    return False


def _tokenizer_folder(engine_dir: Path, tokenizer_dir: Path | None) -> Path:
    if find_tokenizer(engine_dir, tokenizer_dir) is None:
        raise ConfigError(
            f"{engine_dir} came without a tokenizer; give a folder with tokenizer.json as --tokenizer-dir"
        )
    return tokenizer_dir.resolve() if tokenizer_dir else engine_dir / "tokenizer"


def _flag(value: bool) -> str:
    return "true" if value else "false"
