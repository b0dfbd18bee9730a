"""Guided decoding over real ranks, alone, in company, and with guesses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pt_trtllm import LLM, RuntimeOptions, SamplingParams
from pt_trtllm.errors import ConfigError
from pt_trtllm.runtime.speculative.config import SpeculativeConfig
from pt_trtllm.testing.cli import check_cli, refusal

pytestmark = pytest.mark.mpi

SCHEMA = {
    "type": "object",
    "properties": {"who": {"enum": ["Darcy", "Bingley"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
}
SCHEMA |= {"required": ["who", "age"], "additionalProperties": False}
PARAMS = [
    SamplingParams(max_tokens=60, guided_json=json.dumps(SCHEMA)),
    SamplingParams(max_tokens=60, guided_regex=r" Mr\. [A-Z][a-z]{3,7} (said|smiled)\.", temperature=1.0, seed=1),
    SamplingParams(max_tokens=60, guided_choice=("yes", "no"), temperature=1.0, seed=2),
    SamplingParams(max_tokens=12, temperature=0.7, seed=3),
]
PROMPTS = ["The gentleman is ", "And then", "Was it true? ", "It is a truth"]


def test_answers_keep_to_their_guides_with_and_without_guesses(
    example_llm: LLM, example_engines: dict[int, Path]
) -> None:
    found = []
    guessing = RuntimeOptions(speculative=SpeculativeConfig(method="ngram"))
    with LLM(example_engines[2], options=guessing) as with_guesses:
        for llm in (example_llm, with_guesses):
            found.append([result.outputs[0] for result in llm.generate(PROMPTS, PARAMS)])
            with pytest.raises(ConfigError, match="guided_regex is not valid"):
                llm.generate("x", SamplingParams(guided_regex="("))
            assert llm.generate("x", SamplingParams(max_tokens=1))[0].finished, "a refused request ended the engine"
    answer, regex, choice, free = found[0]
    assert json.loads(str(answer.text))["who"] in ("Darcy", "Bingley")
    assert re.fullmatch(str(PARAMS[1].guided_regex), str(regex.text))
    assert choice.text in ("yes", "no")
    assert [out.finish_reason for out in (answer, regex, choice)] == ["stop"] * 3
    assert len(free.token_ids) == 12
    assert [out.token_ids for out in found[0]] == [out.token_ids for out in found[1]]


def test_the_command_line_guides(example_engines: dict[int, Path], tmp_path: Path) -> None:
    engine = example_engines[1]
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    done = check_cli(
        "run", "--engine-dir", engine, "--prompt", "He: ", "--guided-json", f"@{tmp_path}/schema.json",
        "--output-json", tmp_path / "o.json",
    )  # fmt: skip
    (output,) = json.loads((tmp_path / "o.json").read_text())["outputs"]
    assert set(json.loads(output["text"])) == {"who", "age"}
    assert done.returncode == 0
    line = refusal("run", "--engine-dir", engine, "--prompt", "x", "--guided-grammar", "@/nowhere/g.lark")
    assert "--guided-grammar: cannot read '/nowhere/g.lark'" in line
