"""The comparison of engines that scripts/gpu_check.sh runs on a GPU: here between engines of the CPU backend."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.engine.build import BuildOptions, build
from pt_trtllm.engine.tensorrt.gpu import present_gpu
from pt_trtllm.errors import EngineError
from pt_trtllm.testing.gpu_engines import LIMITS, SKIPPED, VARIANTS, check, compare, main, variants, why_not

pytestmark = pytest.mark.unit
EXAMPLE = Path(__file__).parents[2] / "examples/tiny-pt"
PROMPTS = [case["input_ids"] for case in json.loads((EXAMPLE / "reference.json").read_text())["cases"]][:2]


def engine(folder: Path, dtype: str) -> Path:
    convert(EXAMPLE, folder / f"{dtype}-checkpoint", ConvertOptions(dtype=dtype))
    build(folder / f"{dtype}-checkpoint", folder / dtype, BuildOptions(limits=LIMITS))
    return folder / dtype


def test_an_engine_is_good_within_its_bound_and_bad_beyond(tmp_path: Path) -> None:
    expected, found = engine(tmp_path, "float32"), engine(tmp_path, "bfloat16")
    line = compare(expected, found, PROMPTS, 5e-2)
    assert line["good"]
    assert line["wrong_tokens"] == []
    assert line["tokens"] == 24 * len(PROMPTS)
    assert 0 < line["logits_error"] <= 5e-2
    assert not compare(expected, found, PROMPTS, line["logits_error"] / 2)["good"]
    same = compare(expected, expected, PROMPTS, 0)
    assert (same["good"], same["logits_error"], same["same_tokens"]) == (True, 0, same["tokens"])


def test_an_engine_that_answers_otherwise_is_found(tmp_path: Path) -> None:
    """The same model but for the sign of its last norm: every logit is negated."""
    shutil.copytree(EXAMPLE, tmp_path / "source")
    tensors = load_file(EXAMPLE / "model.safetensors")
    save_file({**tensors, "model.norm.weight": -tensors["model.norm.weight"]}, tmp_path / "source/model.safetensors")
    convert(tmp_path / "source", tmp_path / "other-checkpoint", ConvertOptions(dtype="float32"))
    build(tmp_path / "other-checkpoint", tmp_path / "other", BuildOptions(limits=LIMITS))
    line = compare(engine(tmp_path, "float32"), tmp_path / "other", PROMPTS, 1e-2)
    assert not line["good"]
    assert [entry["token"] for entry in line["wrong_tokens"]] == [0, 0]
    assert line["same_tokens"] == 0


def test_a_variant_is_built_for_the_gpu_of_the_machine(tmp_path: Path) -> None:
    if present_gpu() is not None:
        pytest.skip("there is a GPU here")
    pytest.importorskip("tensorrt_rtx", reason="needs pip install '.[rtx]'")
    with pytest.raises(EngineError, match="no GPU here to build for"):
        check(EXAMPLE, PROMPTS, VARIANTS[1], tmp_path)


def test_float8_variants_are_left_out_where_a_gpu_has_none() -> None:
    assert variants(("sm89",)) == list(VARIANTS)
    assert {variant.method for variant in variants(("sm80",))} == {"none", "int8_wo", "int4_wo"}


def test_without_a_gpu_nothing_is_run_and_the_reason_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if present_gpu() is not None:
        pytest.skip("there is a GPU here")
    assert why_not(None) == "the driver shows no GPU"
    monkeypatch.setattr("sys.argv", ["gpu_engines", str(tmp_path / "engines.json")])
    assert main() == SKIPPED
    assert json.loads((tmp_path / "engines.json").read_text()) == {"skipped": "the driver shows no GPU", "lines": []}
    assert "gpu_engines: not run: the driver shows no GPU" in capsys.readouterr().out
