"""A repository for Triton's vLLM backend: what is written, what is refused, and how the client asks its model."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("tritonclient.grpc", reason="needs the serve extra: pip install '.[serve]'")

import grpc
import numpy as np
from tritonclient.grpc import model_config_pb2, service_pb2_grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import serialize_byte_tensor

from pt_trtllm import SamplingParams
from pt_trtllm.cli.main import cli
from pt_trtllm.errors import ConfigError, PtError, ServingError
from pt_trtllm.serving import tritonserver
from pt_trtllm.serving.client import Client
from pt_trtllm.serving.model_config import from_text
from pt_trtllm.serving.tritonserver import ServerBinary, check_backends
from pt_trtllm.serving.vllm_repository import ENGINE_OPTIONS, VllmOptions, deploy_vllm
from pt_trtllm.serving.vllm_wire import sampling_parameters

pytestmark = pytest.mark.unit

EXAMPLE = Path(__file__).parents[2] / "examples/tiny-pt"
GIVEN: dict[str, tuple[object, object]] = {
    "tensor-parallel-size": (4, 4),
    "distributed-executor-backend": ("ray", "ray"),
    "dtype": ("float32", "float32"),
    "quantization": ("fp8", "fp8"),
    "kv-cache-dtype": ("fp8", "fp8"),
    "max-model-len": (256, 256),
    "max-num-seqs": (8, 8),
    "max-num-batched-tokens": (512, 512),
    "gpu-memory-utilization": (0.5, 0.5),
    "additional-config": ('{"parallel_track": {"batch_tracks": true}}', {"parallel_track": {"batch_tracks": True}}),
}
"""Every option of vLLM's that takes a value: what is given, and what model.json has."""


def deploy(tmp_path: Path, *args: object, model_dir: Path = EXAMPLE) -> Any:
    own = ("--backend", "vllm", "--model-dir", model_dir, "--model-repository", tmp_path / "r")
    return CliRunner().invoke(cli, [str(arg) for arg in ("deploy", *own, *args)])


def copy_of_example(folder: Path, **changes: object) -> Path:
    """The example's folder, by links, with another config.json."""
    folder.mkdir()
    for path in EXAMPLE.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "config.json").unlink()
    config = json.loads((EXAMPLE / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_repository_is_what_tritons_vllm_backend_reads(tmp_path: Path) -> None:
    given = [text for name, (value, _) in GIVEN.items() for text in (f"--{name}", str(value))]
    flags = ("--no-enable-prefix-caching", "--enforce-eager")
    result = deploy(tmp_path, *given, *flags, "--engine-arg", "max-logprobs=5", "--engine-arg", "load_format=auto")
    assert result.exit_code == 0, result.output
    files = {str(path.relative_to(tmp_path / "r")) for path in (tmp_path / "r").rglob("*") if path.is_file()}
    assert files == {"manifest.json", "vllm_model/config.pbtxt", "vllm_model/1/model.json"}
    args = json.loads((tmp_path / "r/vllm_model/1/model.json").read_text())
    assert args == {
        "model": str(EXAMPLE),
        **{name.replace("-", "_"): expected for name, (_, expected) in GIVEN.items()},
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "max_logprobs": 5,
        "load_format": "auto",
    }
    assert set(ENGINE_OPTIONS) < set(args)
    config = from_text((tmp_path / "r/vllm_model/config.pbtxt").read_text())
    assert (config.name, config.backend, config.max_batch_size) == ("vllm_model", "vllm", 0)
    assert config.model_transaction_policy.decoupled
    assert [group.kind for group in config.instance_group] == [model_config_pb2.ModelInstanceGroup.KIND_MODEL]
    assert {tensor.name for tensor in config.input if not tensor.optional} == {"text_input"}
    assert {"stream", "sampling_parameters", "exclude_input_in_output"} < {tensor.name for tensor in config.input}
    assert not config.parameters


def test_what_is_not_said_is_left_to_vllm(tmp_path: Path) -> None:
    shutil.copy(EXAMPLE / "tokenizer.json", tmp_path)
    served = ("--served-model-dir", "/models/pt", "--tokenizer-dir", tmp_path)
    result = deploy(tmp_path, *served, "--model-name", "pt", "--report-custom-metrics")
    assert result.exit_code == 0, result.output
    args = json.loads((tmp_path / "r/pt/1/model.json").read_text())
    assert args == {"model": "/models/pt", "tokenizer": str(tmp_path), "tensor_parallel_size": 1}
    config = from_text((tmp_path / "r/pt/config.pbtxt").read_text())
    assert config.parameters["REPORT_CUSTOM_METRICS"].string_value == "true"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--tp-size", 3), "4 tracks cannot be spread over 3 ranks"),
        (("--tp-size", 16), "but this model has 2 attention heads"),
        (("--engine-arg", "pipeline-parallel-size=2"), "does not support pipeline parallelism"),
        (("--engine-arg", "enable_expert_parallel=true"), "does not support expert parallelism"),
        (("--engine-arg", 'speculative_config={"method": "eagle3"}'), "does not support speculation by 'eagle3'"),
        (("--tp-size", 0), "tensor_parallel_size is 0, expected at least 1"),
        (("--max-model-len", 513), "max_model_len is 513, but"),
        (("--gpu-memory-utilization", 1.5), "gpu_memory_utilization is 1.5"),
        (("--served-model-dir", "models/pt"), "expected an absolute path"),
        (("--model-name", "a/b"), "model_name is 'a/b'"),
        (("--additional-config", "[1]"), "--additional-config is [1], expected a JSON object"),
        (("--engine-arg", "max_logprobs"), "expected NAME=VALUE"),
        (("--engine-arg", "dtype=float16"), "engine_args has dtype"),
        (("--engine-arg", "seed=1", "--engine-arg", "seed=2"), "gives seed twice"),
        (("--tokenizer-dir", EXAMPLE.parent), "no tokenizer.json"),
        (("--max-queue-size", 9, "--hostfile", EXAMPLE / "config.json"), "has no --max-queue-size, --hostfile;"),
        (("--engine-dir", EXAMPLE), "--backend vllm has no --engine-dir;"),
    ],
)
def test_what_cannot_be_served_is_refused(tmp_path: Path, args: tuple[object, ...], message: str) -> None:
    result = deploy(tmp_path, *args)
    assert isinstance(result.exception, PtError), result.output
    assert message in str(result.exception)
    assert not (tmp_path / "r").exists()


def test_only_what_the_plugin_serves_is_taken(tmp_path: Path) -> None:
    llama = copy_of_example(tmp_path / "llama", model_type="llama", architectures=["LlamaForCausalLM"])
    assert "expected 'parallel_track'" in str(deploy(tmp_path, model_dir=llama).exception)
    other = copy_of_example(tmp_path / "other", architectures=["OtherForCausalLM"])
    refusal = str(deploy(tmp_path, model_dir=other).exception)
    assert "architectures is ['OtherForCausalLM'], expected ['PTForCausalLM']" in refusal


def test_a_quantised_checkpoint_is_vllms_to_read(tmp_path: Path) -> None:
    folder = copy_of_example(tmp_path / "fp8", quantization_config={"quant_method": "compressed-tensors"})
    (folder / "model.safetensors").unlink()
    assert "4 tracks cannot be spread" in str(deploy(tmp_path, "--tp-size", 3, model_dir=folder).exception)
    assert deploy(tmp_path, "--tp-size", 2, model_dir=folder).exit_code == 0


def test_each_backend_has_options_of_its_own(tmp_path: Path) -> None:
    def refused(*args: object) -> str:
        result = CliRunner().invoke(cli, ["deploy", "--model-repository", str(tmp_path / "r"), *map(str, args)])
        assert result.exit_code in (1, 2)
        return str(result.exception) + result.output

    assert "without --backend vllm there is no --tensor-parallel-size;" in refused("--tp-size", 2)
    assert "there is no --model-dir;" in refused("--model-dir", EXAMPLE)
    assert "Missing option '--engine-dir'" in refused()
    assert "Missing option '--model-dir'" in refused("--backend", "vllm")
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine/config.json").write_text('{"backend": "cpu"}')
    assert "an engine of backend 'cpu', not 'tensorrt'" in refused(
        "--backend", "tensorrt", "--engine-dir", tmp_path / "engine"
    )


def test_inspect_shows_the_repository(tmp_path: Path) -> None:
    deploy(tmp_path, "--tp-size", 2)
    shown = json.loads(CliRunner().invoke(cli, ["inspect", str(tmp_path / "r"), "--json"]).output)
    assert (shown["backend"], shown["models"]) == ("vllm", ["vllm_model"])
    assert shown["engine_args"]["vllm_model"]["tensor_parallel_size"] == 2
    assert shown["model_dir"] == str(EXAMPLE)


def test_serve_says_that_its_server_has_no_such_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deploy_vllm(EXAMPLE, None, tmp_path / "r", VllmOptions())
    server = tmp_path / "tritonserver"
    server.touch(stat.S_IRWXU)
    monkeypatch.setattr(tritonserver, "CONTAINER_BACKENDS", tmp_path / "backends")
    serve = ["serve", "--model-repository", str(tmp_path / "r"), "--tritonserver", str(server)]
    refusal = CliRunner().invoke(cli, serve).exception
    assert isinstance(refusal, ConfigError)
    assert f"model vllm_model needs Triton's vllm backend, which {server} does not have" in str(refusal)
    assert "-vllm-python-py3 with pt-trtllm installed in it" in str(refusal)

    binary = ServerBinary(server, is_embedded=False)
    check_backends(tmp_path / "r", binary, ["--backend-directory=/elsewhere"])
    (tmp_path / "backends/vllm").mkdir(parents=True)
    check_backends(tmp_path / "r", binary, [])
    (tmp_path / "r/other/config.pbtxt").mkdir(parents=True)  # for Triton to complain about
    with pytest.raises(ConfigError, match="needs Triton's vllm backend"):
        check_backends(tmp_path / "r", ServerBinary(server, is_embedded=True), [])


class Backend(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers as Triton's vLLM backend does, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}

    def ServerLive(self, request: Any, context: Any) -> Any:
        return pb.ServerLiveResponse(live=True)

    def ModelMetadata(self, request: Any, context: Any) -> Any:
        answer = pb.ModelMetadataResponse(name=request.name)
        for name in ("text_input", "stream", "sampling_parameters"):
            answer.inputs.add(name=name)
        for name in ("text_output", "finish_reason", "logprobs"):
            answer.outputs.add(name=name)
        return answer

    def ModelConfig(self, request: Any, context: Any) -> Any:
        answer = pb.ModelConfigResponse()
        answer.config.model_transaction_policy.decoupled = True
        return answer

    def ModelStreamInfer(self, requests: Any, context: Any) -> Iterator[Any]:
        request = next(requests)
        self.asked = {
            tensor.name: raw[4:].decode() if tensor.datatype == "BYTES" else raw != b"\0"
            for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        self.asked["shapes"] = {tuple(tensor.shape) for tensor in request.inputs}
        self.asked["outputs"] = [output.name for output in request.outputs]
        pieces = [("a ", "None"), ("tru", "None"), ("th", "length")]
        for text, reason in pieces if self.asked["stream"] else [("a truth", "length")]:
            message = pb.ModelStreamInferResponse()
            for name, value in (("text_output", text), ("finish_reason", reason)):
                message.infer_response.outputs.add(name=name, datatype="BYTES", shape=[1])
                raw = serialize_byte_tensor(np.array([value.encode()], np.object_)).item()
                message.infer_response.raw_output_contents.append(raw)
            message.infer_response.parameters["triton_final_response"].bool_param = reason == "length"
            yield message


@pytest.fixture
def backend() -> Iterator[tuple[Backend, Client]]:
    backend = Backend()
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(backend, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            with Client(f"127.0.0.1:{port}", model="vllm_model") as client:
                yield backend, client
        finally:
            server.stop(None).wait()


def test_the_client_asks_as_the_backend_wants(backend: tuple[Backend, Client]) -> None:
    server, client = backend
    chunks = list(client.stream("It is", SamplingParams(max_tokens=3, stop=("x",))))
    assert [(chunk.text, chunk.finish_reason) for chunk in chunks] == [("a ", None), ("tru", None), ("th", "length")]
    assert json.loads(server.asked.pop("sampling_parameters")) == {"max_tokens": 3, "temperature": 0.0, "stop": ["x"]}
    assert server.asked == {
        "text_input": "It is", "stream": True, "exclude_input_in_output": True, "return_finish_reason": True,
        "shapes": {(1,)}, "outputs": ["text_output", "finish_reason"],
    }  # fmt: skip
    whole = client.generate("It is")
    assert (whole.text, whole.finish_reason, server.asked["stream"]) == ("a truth", "length", False)


def test_what_the_backend_has_nothing_for_is_refused(backend: tuple[Backend, Client]) -> None:
    _, client = backend
    with pytest.raises(ServingError, match="nothing for logit_bias, n, timeout_s; leave it out"):
        client.generate("It is", SamplingParams(n=2, temperature=1.0, logit_bias={1: 2.0}), timeout_s=3)
    with pytest.raises(ServingError, match="nothing for token ids; give the text"):
        client.generate([3, 4])


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(max_tokens=3), {"max_tokens": 3, "temperature": 0.0}),
        (SamplingParams(max_tokens=3, top_k=1, temperature=2.0), {"max_tokens": 3, "temperature": 0.0}),
        (SamplingParams(max_tokens=3, top_p=0.5), {"max_tokens": 3, "top_p": 0.5}),
        (
            SamplingParams(max_tokens=3, temperature=0.7, seed=4, ignore_eos=True, stop_token_ids=(5,)),
            {"max_tokens": 3, "temperature": 0.7, "seed": 4, "ignore_eos": True, "stop_token_ids": (5,)},
        ),
        (
            SamplingParams(max_tokens=3, guided_choice=("a", "b")),
            {"max_tokens": 3, "temperature": 0.0, "structured_outputs": '{"choice": ["a", "b"]}'},
        ),
        (
            SamplingParams(max_tokens=3, guided_json="{}"),
            {"max_tokens": 3, "temperature": 0.0, "structured_outputs": '{"json": {}}'},
        ),
        (
            SamplingParams(max_tokens=3, guided_regex="a+"),
            {"max_tokens": 3, "temperature": 0.0, "structured_outputs": '{"regex": "a+"}'},
        ),
    ],
)
def test_options_have_vllms_names(params: SamplingParams, expected: dict[str, Any]) -> None:
    assert sampling_parameters(params) == expected
