"""What `deploy --backend vllm` writes, against the arguments of the real vLLM's engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM: scripts/test_vllm.sh")

from vllm.engine.arg_utils import AsyncEngineArgs

from pt_trtllm.serving.vllm_repository import ENGINE_OPTIONS, PLACES, VllmOptions, engine_args

pytestmark = pytest.mark.vllm

EXAMPLE = Path(__file__).parents[2] / "examples/tiny-pt"


def test_every_option_is_an_argument_of_vllms_engine() -> None:
    assert {*ENGINE_OPTIONS, *PLACES} <= {field.name for field in dataclasses.fields(AsyncEngineArgs)}


def test_vllm_takes_what_deploy_writes() -> None:
    options = VllmOptions(
        tensor_parallel_size=2,
        dtype="float32",
        max_model_len=256,
        enable_prefix_caching=False,
        enforce_eager=True,
        additional_config={"parallel_track": {}},
        engine_args={"max_logprobs": 5},
    )
    made = AsyncEngineArgs(**engine_args(EXAMPLE, EXAMPLE.parent, options))
    assert (made.model, made.tokenizer, made.tensor_parallel_size) == (str(EXAMPLE), str(EXAMPLE.parent), 2)
    assert (made.dtype, made.max_model_len, made.enforce_eager, made.max_logprobs) == ("float32", 256, True, 5)
    assert (made.enable_prefix_caching, made.additional_config) == (False, {"parallel_track": {}})
