"""The plugin's option for the collective: what it takes, and what it refuses. No vLLM is needed here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pt_trtllm.errors import ConfigError
from pt_trtllm.vllm.options import PluginOptions
from pt_trtllm.vllm.refusals import asked_for_in_vain

pytestmark = pytest.mark.unit


def vllm_config(collective: str, **parallel: Any) -> SimpleNamespace:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel),
        speculative_config=None,
        compilation_config=SimpleNamespace(pass_config=SimpleNamespace()),
        additional_config={"parallel_track": {"collective": collective}},
    )


def test_tracks_meet_by_vllms_all_reduce_unless_asked_otherwise() -> None:
    assert PluginOptions.read({}).collective == "vllm"
    assert PluginOptions.read({"parallel_track": {"collective": "pt"}}).collective == "pt"
    with pytest.raises(ConfigError, match="collective is 'nccl', expected one of vllm, pt"):
        PluginOptions.read({"parallel_track": {"collective": "nccl"}})


@pytest.mark.parametrize("parallel", [{"enable_dbo": True}, {"ubatch_size": 2}])
def test_our_own_collective_serves_one_stream(parallel: dict[str, Any]) -> None:
    (problem,) = asked_for_in_vain(vllm_config("pt", **parallel))
    assert "collective 'pt' with micro-batches" in problem
    assert asked_for_in_vain(vllm_config("vllm", **parallel)) == []
    assert asked_for_in_vain(vllm_config("pt", enable_dbo=False, ubatch_size=0)) == []
