"""LoRA adapters, speculation by n-grams and prefix caching in a real vLLM: the tokens are those of our CPU engine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pt_trtllm.testing.adapters import merge, write_adapter

sys.path.insert(0, str(Path(__file__).parent))
from vllm_runs import Answer, Job, our_answers, vllm_answers

EXAMPLE = Path(__file__).parents[2] / "examples/tiny-pt"
CASES = json.loads((EXAMPLE / "reference.json").read_text())["cases"]
SHORT = [case["input_ids"] + case["output_ids"] for case in CASES]
LONG = [SHORT[0] + SHORT[1] + SHORT[2], SHORT[1] + SHORT[2] + SHORT[0]]
"""Longer than the blocks of vLLM's cache."""
PROMPTS = [*SHORT, *LONG]
NUM_TOKENS = 16
LORA = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8}
"""One slot more than adapters: vLLM's CPU kernels let requests without an adapter use the last slot's."""

FIRST = [
    f"model.tracks.{track}.layers.{layer}.{module}"
    for track, layer in ((0, 0), (1, 2), (2, 3), (3, 0), (3, 3))
    for module in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
]
SECOND = [
    f"model.tracks.3.layers.{layer}.{module}"
    for layer in range(4)
    for module in ("self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj")
]
"""Of one track only: a rank that does not hold it has nothing to add."""


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Answer]]:
    """Adapter ("" for none) -> what our engine says with it merged into the weights."""
    work = tmp_path_factory.mktemp("adapters")
    found = {"": our_answers(EXAMPLE, PROMPTS, NUM_TOKENS, work / "ours")}
    for seed, modules in enumerate((FIRST, SECOND)):
        adapter, merged = work / f"adapter{seed}", work / f"merged{seed}"
        write_adapter(EXAMPLE, adapter, modules, seed, 0.2)
        merge(EXAMPLE, adapter, merged)
        found[str(adapter)] = our_answers(merged, PROMPTS, NUM_TOKENS, work / f"ours{seed}")
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_adapters_of_one_batch_each_answer_as_their_merged_weights(
    expected: dict[str, list[Answer]], ranks: int, tmp_path: Path
) -> None:
    requests = [
        {"prompt": prompt, "max_tokens": NUM_TOKENS, "adapter": adapter} for adapter in expected for prompt in PROMPTS
    ]
    elsewhere = tmp_path / "head"
    write_adapter(EXAMPLE, elsewhere, ["model.embed_tokens"], 0)
    wrong = [{"prompt": PROMPTS[0], "max_tokens": 1, "adapter": str(elsewhere)}]
    found, refused = vllm_answers([Job(EXAMPLE, requests, LORA), Job(EXAMPLE, wrong, LORA)], ranks, tmp_path / "vllm")
    assert not isinstance(found, str), found
    assert [answer.ids for answer in found] == [answer.ids for answers in expected.values() for answer in answers]
    assert isinstance(refused, str)
    assert "embed_tokens" in refused
    texts = {adapter: [answer.ids for answer in answers] for adapter, answers in expected.items()}
    assert len({json.dumps(text) for text in texts.values()}) == len(texts)  # adapters differ, or nothing is shown


@pytest.mark.parametrize("ranks", [1, 2])
def test_speculation_and_cached_prefixes_change_no_token(
    expected: dict[str, list[Answer]], ranks: int, tmp_path: Path
) -> None:
    options = {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
        "enable_prefix_caching": True,
        "block_size": 32,
    }
    requests = [{"prompt": prompt, "max_tokens": NUM_TOKENS} for prompt in PROMPTS]
    (found,) = vllm_answers([Job(EXAMPLE, requests, options, times=2)], ranks, tmp_path / "vllm")
    assert not isinstance(found, str), found
    assert [answer.ids for answer in found] == [answer.ids for answer in expected[""]]
    assert all(answer.cached >= 64 for answer in found[len(SHORT) :])
