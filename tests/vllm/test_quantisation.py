"""Quantised PT checkpoints in a real vLLM: each answers as our CPU engine does from the same numbers in float32."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pt_trtllm.config import ModelConfig
from pt_trtllm.testing.compressed import Kind, Quantised, quantise
from pt_trtllm.testing.vllm_cases import BIASED, write_random_pt

sys.path.insert(0, str(Path(__file__).parent))
from vllm_runs import Answer, Job, our_answers, vllm_answers

EXAMPLE = Path(__file__).parents[2] / "examples/tiny-pt"
CASES = json.loads((EXAMPLE / "reference.json").read_text())["cases"]
PROMPTS = [case["input_ids"] + case["output_ids"] for case in CASES]
OTHER_PROMPTS = [[(7 * i + j) % 512 for i in range(length)] for j, length in enumerate((20, 33, 5))]
SINGLE = ModelConfig(
    **BIASED, vocab_size=512, num_tracks=1, num_hidden_layers=4, sync_interval=2, hidden_size=128,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=256, max_position_embeddings=512,
)  # fmt: skip

# Mean difference of a prompt token's log-probability to float32 with the same weights. vLLM's CPU kernels for int8 and
# int4 take bfloat16 only, and 8-bit activations add their own rounding.
DTYPES: dict[Kind, str] = {"int4_w4a16": "bfloat16", "int8_w8a8": "bfloat16", "fp8_w8a8": "float32"}
MARGINS: dict[Kind, float] = {"int4_w4a16": 0.03, "int8_w8a8": 0.04, "fp8_w8a8": 0.04}


def job(model: Path, prompts: Sequence[Sequence[int]], **options: Any) -> Job:
    requests = [{"prompt": list(prompt), "max_tokens": 4, "prompt_logprobs": 0} for prompt in prompts]
    return Job(model, requests, options)


def difference(found: Sequence[Answer] | str, expected: Sequence[Answer]) -> float:
    assert not isinstance(found, str), found
    pairs = [
        (mine, theirs)
        for one, other in zip(found, expected, strict=True)
        for mine, theirs in zip(one.prompt_logprobs, other.prompt_logprobs, strict=True)
    ]
    return sum(abs(mine - theirs) for mine, theirs in pairs) / len(pairs)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Quantised]:
    """The example; one layer of one track stays float, as an ignore list says in the checkpoint's own names."""
    work = tmp_path_factory.mktemp("example")
    kept = tuple(f"model.tracks.3.layers.0.self_attn.{letter}_proj" for letter in "qkv")
    return {kind: quantise(EXAMPLE, work / kind, kind, kept) for kind in DTYPES}


@pytest.fixture(scope="module")
def expected(folders: dict[Kind, Quantised], tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, list[Answer]]:
    work = tmp_path_factory.mktemp("ours")
    return {kind: our_answers(pair.plain, PROMPTS, 4, work / kind) for kind, pair in folders.items()}


def test_on_one_rank(folders: dict[Kind, Quantised], expected: dict[Kind, list[Answer]], tmp_path: Path) -> None:
    jobs = [job(pair.folder, PROMPTS, dtype=DTYPES[kind]) for kind, pair in folders.items()]
    jobs.append(job(EXAMPLE, PROMPTS, dtype="bfloat16", quantization="fp8_per_channel"))
    *found, online = vllm_answers(jobs, 1, tmp_path / "vllm")
    differences = {kind: difference(answers, expected[kind]) for kind, answers in zip(folders, found, strict=True)}
    print(differences, difference(online, expected["fp8_w8a8"]))
    assert {kind: found for kind, found in differences.items() if found > MARGINS[kind]} == {}
    # Quantised while it is loaded: the same numbers but for bfloat16 and the layer that the folder keeps.
    assert difference(online, expected["fp8_w8a8"]) < 2 * MARGINS["fp8_w8a8"]
    # And the margins tell: other weights, of the same model in another precision, are further away.
    assert difference(found[list(folders).index("int4_w4a16")], expected["fp8_w8a8"]) > MARGINS["int4_w4a16"]


def test_on_two_ranks(folders: dict[Kind, Quantised], expected: dict[Kind, list[Answer]], tmp_path: Path) -> None:
    """Two tracks a rank; and a model of one track, with biases and a head of its own, that two ranks share."""
    single = tmp_path / "single"
    write_random_pt(SINGLE, single)
    cut = {kind: quantise(single, tmp_path / f"single-{kind}", kind) for kind in DTYPES}
    jobs = [job(pair.folder, PROMPTS, dtype=DTYPES[kind]) for kind, pair in folders.items()]
    jobs += [job(pair.folder, OTHER_PROMPTS, dtype=DTYPES[kind]) for kind, pair in cut.items()]
    whole = vllm_answers(jobs[len(DTYPES) :], 1, tmp_path / "one")
    found = vllm_answers(jobs, 2, tmp_path / "two")
    differences = {kind: difference(answers, expected[kind]) for kind, answers in zip(folders, found, strict=False)}
    ours = {kind: our_answers(pair.plain, OTHER_PROMPTS, 4, tmp_path / f"ours-{kind}") for kind, pair in cut.items()}
    for kind, one, two in zip(cut, whole, found[len(DTYPES) :], strict=True):
        apart, uncut = difference(two, ours[kind]), difference(one, ours[kind])
        print(kind, differences[kind], "cut", apart, "whole", uncut)
        assert differences[kind] < MARGINS[kind]
        assert apart < 1.5 * uncut + 0.01  # random weights have no margins of their own: as far as without a cut
