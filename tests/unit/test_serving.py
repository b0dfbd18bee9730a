"""Serving without a server: repositories, configurations, and what requests mean."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("tritonclient.grpc", reason="needs the serve extra: pip install '.[serve]'")

from pt_trtllm.cli.main import cli
from pt_trtllm.errors import ConfigError, PtError
from pt_trtllm.serving.belongings import Belongings
from pt_trtllm.serving.control import END, WAIT, DrainFollower, DrainOrder
from pt_trtllm.serving.model_config import MODELS, from_text
from pt_trtllm.serving.repository import DeployOptions, deploy, template_folder
from pt_trtllm.serving.sampling_fields import Given, sampling_params
from pt_trtllm.serving.server_options import ServerOptions
from pt_trtllm.serving.tritonserver import ServerBinary, find_tritonserver
from pt_trtllm.serving.word_lists import pack_words, unpack_words

pytestmark = pytest.mark.unit

EXAMPLE = Path(__file__).parents[2] / "examples/tiny-pt"


def invoke(*args: object) -> Any:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    assert invoke("convert", "--model-dir", EXAMPLE, "--output-dir", folder / "checkpoint").exit_code == 0
    made = invoke("build", "--checkpoint-dir", folder / "checkpoint", "--output-dir", folder / "engine")
    assert made.exit_code == 0, made.output
    return folder / "engine"


def configs(repository: Path) -> dict[str, Any]:
    return {name: from_text((repository / name / "config.pbtxt").read_text()) for name in MODELS}


def test_deploy_writes_five_complete_models(engine_dir: Path, tmp_path: Path) -> None:
    result = invoke(
        "deploy", "--engine_dir", engine_dir, "--model_repository", tmp_path / "r", "--max-queue-size", 9,
        "--include-input-in-output",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    made = configs(tmp_path / "r")
    assert {path.name for path in (tmp_path / "r").iterdir()} == {*MODELS, "manifest.json"}
    assert all(any((tmp_path / "r" / name / "1").iterdir()) for name in MODELS)
    core = made["tensorrt_llm"]
    assert (core.backend, core.model_transaction_policy.decoupled) == ("python", True)
    assert core.output[0].name == "output_ids"
    assert core.parameters["gpt_model_path"].string_value == str(engine_dir)
    assert core.parameters["max_queue_size"].string_value == "9"
    assert core.parameters["exclude_input_in_output"].string_value == "false"
    for name, config in made.items():
        required = {tensor.name for tensor in config.input if not tensor.optional}
        assert config.max_batch_size == 64
        assert config.name == name
        if name in ("ensemble", "tensorrt_llm_bls"):
            assert required == {"text_input", "max_tokens"}


@pytest.mark.parametrize("backend", ["cpu", "tensorrt-llm"])
def test_the_ensembles_wires_fit_in_name_and_type(engine_dir: Path, tmp_path: Path, backend: str) -> None:
    made = configs(repository_of(engine_dir, tmp_path, backend))
    ensemble = made["ensemble"]
    wires = {tensor.name: tensor.data_type for tensor in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        model = made[step.model_name]
        inputs = {tensor.name: tensor for tensor in model.input}
        outputs = {tensor.name: tensor for tensor in model.output}
        assert {name for name, tensor in inputs.items() if not tensor.optional} <= set(step.input_map)
        for name, wire in step.input_map.items():
            assert inputs[name].data_type == wires[wire], (step.model_name, name, wire)
        for name, wire in step.output_map.items():
            assert wire not in wires
            wires[wire] = outputs[name].data_type
    for tensor in ensemble.output:
        assert wires[tensor.name] == tensor.data_type
    mapped = {wire for step in ensemble.ensemble_scheduling.step for wire in step.input_map.values()}
    unread = {tensor.name for tensor in ensemble.input} - mapped
    assert unread <= {"min_length", "random_seed"} if backend == "tensorrt-llm" else not unread


def repository_of(engine_dir: Path, tmp_path: Path, backend: str, *options: str) -> Path:
    """Of an engine of this backend: TensorRT-LLM's is only named, for it takes a GPU to build one."""
    tokenizer: tuple[object, ...] = ()
    if backend == "tensorrt-llm":
        config = json.loads((engine_dir / "config.json").read_text())
        (tmp_path / "engine").mkdir()
        (tmp_path / "engine/config.json").write_text(json.dumps({**config, "backend": backend}))
        engine_dir, tokenizer = tmp_path / "engine", ("--tokenizer-dir", EXAMPLE)
    args = ("--engine-dir", engine_dir, *tokenizer, "--model-repository", tmp_path / "r", *options)
    result = invoke("deploy", *args)
    assert result.exit_code == 0, result.output
    return tmp_path / "r"


@pytest.mark.parametrize("backend", ["cpu", "tensorrt-llm"])
def test_without_decoupling_no_model_streams(engine_dir: Path, tmp_path: Path, backend: str) -> None:
    made = configs(repository_of(engine_dir, tmp_path, backend, "--no-decoupled"))
    assert not any(config.model_transaction_policy.decoupled for config in made.values())
    several = [-1] if backend == "cpu" else [1]
    for name in ("tensorrt_llm", "ensemble", "tensorrt_llm_bls"):
        assert {tensor.name: list(tensor.dims) for tensor in made[name].output}["num_output_tokens"] == several


def test_preprocessing_knows_the_longest_prompt(engine_dir: Path, tmp_path: Path) -> None:
    limits = json.loads((engine_dir / "config.json").read_text())["build_config"]
    for backend in ("cpu", "tensorrt-llm"):
        (tmp_path / backend).mkdir()
        made = configs(repository_of(engine_dir, tmp_path / backend, backend))["preprocessing"]
        assert made.parameters["max_input_len"].string_value == str(limits["max_input_len"])


def test_tensorrt_llms_engines_get_tritons_own_backend(engine_dir: Path, tmp_path: Path) -> None:
    repository = repository_of(engine_dir, tmp_path, "tensorrt-llm")
    core = configs(repository)["tensorrt_llm"]
    assert core.backend == "tensorrtllm"
    assert not (repository / "tensorrt_llm/1/model.py").exists()
    assert core.parameters["gpt_model_type"].string_value == "inflight_fused_batching"
    assert not {"text_piece", "finish_reason"} & {tensor.name for tensor in core.output}


def test_deploy_refuses_what_it_would_destroy_or_cannot_use(engine_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").touch()
    new = ("--engine-dir", engine_dir, "--model-repository", tmp_path / "r")
    mine = ("--engine-dir", engine_dir, "--model-repository", tmp_path / "mine")
    for args, message in (
        (mine, "is not empty"),
        ((*mine, "--force"), "was not written by"),
        (("--engine-dir", tmp_path, "--model-repository", tmp_path / "r"), "no config.json"),
        (("--engine-dir", engine_dir, "--model-repository", engine_dir), "which is being read"),
        ((*new, "--tokenizer-dir", tmp_path), "no tokenizer"),
        ((*new, "--max-queue-size", -1), "max_queue_size is -1"),
    ):
        result = invoke("deploy", *args)
        assert isinstance(result.exception, PtError), result.output
        assert message in str(result.exception)
    assert not (tmp_path / "r").exists()
    deploy(engine_dir, None, tmp_path / "r", DeployOptions())
    deploy(engine_dir, None, tmp_path / "r", DeployOptions(force=True))


def test_inspect_shows_a_repository_and_its_engine(engine_dir: Path, tmp_path: Path) -> None:
    deploy(engine_dir, None, tmp_path / "r", DeployOptions())
    shown = json.loads(invoke("inspect", tmp_path / "r", "--json").output)
    assert (shown["kind"], shown["models"]) == ("model repository", sorted(MODELS))
    assert shown["engine"]["backend"] == "cpu"


def test_the_templates_are_thin() -> None:
    for path in template_folder().glob("*/1/model.py"):
        assert len(path.read_text().splitlines()) < 10, path


@given(st.lists(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), max_size=4), min_size=1, max_size=3))
def test_word_lists_come_back_as_they_went(rows: list[list[list[int]]]) -> None:
    packed = pack_words(rows)
    assert packed.dtype == np.int32
    assert [[list(word) for word in unpack_words(row, "w")] for row in packed] == rows


@pytest.mark.parametrize("ends", [[3, 2], [9], [0], [-2]])
def test_word_lists_with_senseless_offsets_are_refused(ends: list[int]) -> None:
    packed = np.array([[1, 2, 3, 4], [*ends, *[-1] * (4 - len(ends))]], np.int32)
    with pytest.raises(ConfigError, match="end offset"):
        unpack_words(packed, "stop_words_list")


@pytest.mark.parametrize(
    ("end_id", "ignores", "stops"), [(None, False, ()), (2, False, ()), (-1, True, ()), (50, True, ()), (7, True, (7,))]
)
def test_an_end_id_outside_the_vocabulary_means_do_not_end(
    end_id: int | None, ignores: bool, stops: tuple[int, ...]
) -> None:
    params = sampling_params(Given(values={"request_output_len": 4, "end_id": end_id}), eos_ids=(2, 3), vocab_size=50)
    assert (params.ignore_eos, params.stop_token_ids) == (ignores, stops)


@pytest.mark.parametrize("name", ["temperature", "runtime_top_p", "repetition_penalty", "min_p"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError):
        sampling_params(Given(values={"request_output_len": 4, name: value}), eos_ids=(), vocab_size=50)


def test_server_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not all different"):
        ServerOptions(grpc_port=8000, http_port=8000)
    with pytest.raises(ConfigError, match="expected 0 to 65535"):
        ServerOptions(grpc_port=70000)
    with pytest.raises(ConfigError, match="is not an option"):
        ServerOptions(extra=("log-verbose",))
    with pytest.raises(ConfigError, match="not an executable file"):
        find_tritonserver(tmp_path / "nothing")


def test_what_the_user_decides_stays_theirs(tmp_path: Path) -> None:
    def restricted(*extra: str) -> list[str]:
        """What is closed over gRPC by us."""
        binary = ServerBinary(tmp_path / "tritonserver", is_embedded=False)
        command = ServerOptions(extra=extra).command(tmp_path, binary, Belongings(tmp_path), 8001)
        assert tuple(command[len(command) - len(extra) :]) == extra, "the user's own come last"
        (own,) = [word for word in command if word.startswith("--grpc-restricted-protocol") and word not in extra]
        assert ("--load-model=*" in command) != any("--model-control-mode" in word for word in extra)
        return own.partition("=")[2].partition(":")[0].split(",")

    assert restricted() == ["model-repository", "shared-memory", "trace", "logging"]
    assert restricted("--model-control-mode=explicit") == ["shared-memory", "trace", "logging"]
    assert restricted("--grpc-restricted-protocol=trace,health:k=v") == ["model-repository", "shared-memory", "logging"]
    assert restricted("--grpc-restricted-protocol=health:trace=logging") == restricted(), "that is its secret"
    with pytest.raises(ConfigError, match="Triton's own HTTP port is private"):
        ServerOptions(extra=("--http-port=9",))


def test_a_drain_waits_for_every_core_that_lives(tmp_path: Path) -> None:
    order, core = DrainOrder(tmp_path), DrainFollower(tmp_path)
    (tmp_path / f"core-{2**22 + 1}").write_text("5")  # of a process that is gone
    assert (core.look(3), order.num_left()) == ("", 1)
    order.give(WAIT)
    assert (core.look(3), order.num_left()) == (WAIT, 3)
    order.give(END)
    assert (core.look(0), order.num_left()) == (END, 0)
    assert (tmp_path / f"core-{os.getpid()}").exists()
    assert DrainFollower(None).look(3) == ""


def test_client_refuses_what_it_cannot_send() -> None:
    for args, message in (
        ((), "give either --prompt or --input-ids"),
        (("--input-ids", "[]"), "expected a list of token ids"),
        (("--prompt", "x", "--max-tokens", 0), "max_tokens is 0"),
        (("--prompt", "x", "--url", "127.0.0.1:1"), "no Triton server answers there"),
    ):
        result = invoke("client", *args)
        assert isinstance(result.exception, PtError), result.output
        assert message in str(result.exception)
