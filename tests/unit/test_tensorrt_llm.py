"""`PTForCausalLM` over the recorder of TensorRT-LLM's API: names, the recorded network, and its numbers."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.checkpoint.quantize import Quantization
from pt_trtllm.checkpoint.rank_files import open_checkpoint
from pt_trtllm.engine.build import BuildOptions, build
from pt_trtllm.engine.bundle import BackendOptions, BuildLimits, EngineConfig, open_bundle
from pt_trtllm.errors import ConfigError, EngineError
from pt_trtllm.runtime.llm import LLM
from pt_trtllm.testing.cases import CASES, DENSE, Case
from pt_trtllm.testing.numeric import FLOAT32_LOGITS, assert_close, relative_error
from pt_trtllm.testing.reference import build_model, logits_of, save_checkpoint
from pt_trtllm.testing.trtllm_recorder.evaluate import RecordedWorld, Step
from pt_trtllm.testing.trtllm_recorder.functional import AllReduceStrategy
from pt_trtllm.testing.trtllm_recorder.install import EXPORTS, recorded_tensorrt_llm
from pt_trtllm.testing.trtllm_recorder.network import Network, Node

pytestmark = pytest.mark.unit

PACKAGE = Path(__file__).parents[2] / "pt_trtllm" / "engine" / "tensorrt_llm"
LIMITS = BuildLimits(max_batch_size=4, max_seq_len=32, max_input_len=16, max_num_tokens=16)
LENGTHS, NUM_DECODED = (6, 12, 4), 2
INSTALLED = importlib.util.find_spec("tensorrt_llm") is not None


@pytest.fixture
def recorder() -> Iterator[None]:
    with recorded_tensorrt_llm():
        yield


# --------------------------------------------------------------------------------------------------------- contract


def used_names() -> set[str]:
    """Every name that the package's files import from TensorRT-LLM."""
    return {
        f"{node.module}.{alias.name}"
        for path in PACKAGE.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tensorrt_llm"
        for alias in node.names
    }


def test_the_contract_lists_exactly_what_is_used_and_the_recorder_has_no_more() -> None:
    from pt_trtllm.engine.tensorrt_llm.contract import CONTRACT

    listed = {f"{contract.module}.{contract.name.split('.')[0]}" for contract in CONTRACT}
    assert used_names() == listed
    assert {
        f"{module}.{name}" for module, names in EXPORTS.items() for name in names if name != "__version__"
    } == listed


def test_the_recorder_accepts_only_what_the_contract_lists(recorder: None) -> None:
    from pt_trtllm.engine.tensorrt_llm.contract import CONTRACT, contract_problems, find

    for contract in CONTRACT:
        assert contract_problems(contract) == []
        if contract.parameters:
            accepted = set(inspect.signature(find(contract)).parameters) - {"self"}
            assert accepted <= set(contract.parameters), contract.path


@pytest.mark.skipif(not INSTALLED, reason="tensorrt_llm is not installed")
def test_the_installed_tensorrt_llm_keeps_the_contract() -> None:
    from pt_trtllm.engine.tensorrt_llm.contract import check_contract

    check_contract()


@pytest.mark.gpu
@pytest.mark.skipif(not INSTALLED, reason="tensorrt_llm is not installed")
@pytest.mark.parametrize(("num_tracks", "inside"), [(4, 0), (2, 8)])
def test_the_installed_tensorrt_llm_defines_the_planned_all_reduces(
    num_tracks: int, inside: int, make_source: Any, tmp_path: Path
) -> None:
    """The real network of rank 0, as its builder defines it, counted by plugins."""
    import tensorrt as trt
    from tensorrt_llm.builder import Builder
    from tensorrt_llm.network import net_guard

    from pt_trtllm.engine.tensorrt_llm.backend import rank_model, settle

    source = make_source(num_tracks=num_tracks)
    convert(source, tmp_path / "checkpoint", ConvertOptions(source="tamm", world_size=4, dtype="float16"))
    checkpoint, _ = open_checkpoint(tmp_path / "checkpoint")
    settle(checkpoint, LIMITS, BackendOptions())
    config = EngineConfig(backend="tensorrt-llm", checkpoint=checkpoint, limits=LIMITS)
    model, network = rank_model(tmp_path / "checkpoint", config, 0), Builder().create_network()
    network.plugin_config.paged_kv_cache = True
    with net_guard(network):
        inputs = model.prepare_inputs(
            max_batch_size=4, max_input_len=16, max_seq_len=32, max_num_tokens=16, use_cache=True
        )
        model(**inputs)
    kinds = []
    for index in range(network.trt_network.num_layers):
        layer = network.trt_network.get_layer(index)
        if layer.type == trt.LayerType.PLUGIN_V2:
            layer.__class__ = trt.IPluginV2Layer
            kinds.append(layer.plugin.plugin_type)
    assert kinds.count("AllReduce") == 2 + inside  # 4 layers, fused after every second
    assert kinds.count("AllGather") == 1


@pytest.mark.usefixtures("recorder")
def test_a_name_or_parameter_that_is_missing_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorrt_llm import functional, layers

    from pt_trtllm.engine.tensorrt_llm.registration import register

    monkeypatch.delattr(functional, "tanh")
    monkeypatch.setattr(layers.RmsNorm, "__init__", lambda self, normalized_shape, dtype: None)
    with pytest.raises(EngineError, match=r"1\.2\.1.*functional\.tanh; tensorrt_llm\.layers\.RmsNorm\(eps=\)"):
        register()


@pytest.mark.skipif(INSTALLED, reason="tensorrt_llm is installed")
def test_a_build_without_tensorrt_llm_says_how_to_get_it(make_source: Any, tmp_path: Path) -> None:
    convert(make_source(), tmp_path / "checkpoint", ConvertOptions(source="tamm", world_size=4))
    with pytest.raises(EngineError, match=r"tensorrt_llm is not installed here; run in NVIDIA's .* container"):
        build(tmp_path / "checkpoint", tmp_path / "engine", BuildOptions(backend="tensorrt-llm"))
    assert not (tmp_path / "engine").exists()


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 2}, r"4 tracks on 2 ranks: .* convert with --world-size 4 or a multiple of it"),
        ({"world_size": 4, "quantization": Quantization(method="int8_wo")}, r"quantization int8_wo: .* none"),
    ],
)
def test_what_cannot_be_built_is_refused_before_any_work(
    options: dict[str, Any], message: str, make_source: Any, tmp_path: Path
) -> None:
    convert(make_source(), tmp_path / "checkpoint", ConvertOptions(source="tamm", **options))
    with pytest.raises(ConfigError, match=message):
        build(tmp_path / "checkpoint", tmp_path / "engine", BuildOptions(backend="tensorrt-llm"))


# ----------------------------------------------------------------------------------------------------- the network

SUPPORTED = [
    pytest.param(case, size, id=f"{case.name}-{size}")
    for case in (
        *CASES,
        # As many heads of queries as of keys: stock attention with norms then wants rows head by head.
        Case("as_many_kv_heads", (4,), {"num_kv_heads": None}),
        Case("one_track_fused_nowhere", (1,), {"num_tracks": 1, **DENSE}),
    )
    for size in case.world_sizes
    if size % case.config["num_tracks"] == 0 and case.config["hidden_dim"] % size == 0
]


def define(folder: Path, limits: BuildLimits = LIMITS) -> tuple[EngineConfig, list[Network]]:
    """Every rank's recorded network, through the functions of the build driver."""
    from tensorrt_llm.builder import build as build_engine

    from pt_trtllm.engine.tensorrt_llm.backend import build_config, rank_model, settle

    checkpoint, _ = open_checkpoint(folder)
    config = EngineConfig(backend="tensorrt-llm", checkpoint=checkpoint, limits=limits)
    settle(checkpoint, limits, BackendOptions())
    engines = [
        build_engine(rank_model(folder, config, rank), build_config(config, BackendOptions()))
        for rank in range(checkpoint.world_size)
    ]
    return config, [engine.network for engine in engines]


@pytest.mark.usefixtures("recorder")
@pytest.mark.parametrize(("case", "world_size"), SUPPORTED)
def test_the_recorded_network_computes_the_references_logits(case: Case, world_size: int, tmp_path: Path) -> None:
    from pt_trtllm.engine.tensorrt_llm.support import attention_windows

    model = build_model(case.config)
    save_checkpoint(model, case.config, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "checkpoint", ConvertOptions(source="tamm", world_size=world_size))
    config, networks = define(tmp_path / "checkpoint")
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(97, (length,), generator=generator).tolist() for length in LENGTHS]
    world = RecordedWorld(networks, attention_windows(config.checkpoint.model, LIMITS.max_seq_len))
    found = logits_by_steps(world, sequences)
    with torch.no_grad():
        for index, tokens in enumerate(sequences):
            assert_close(found[index][:, :97], logits_of(model, tokens), FLOAT32_LOGITS, f"sequence {index}")


def logits_by_steps(world: RecordedWorld, sequences: list[list[int]]) -> list[torch.Tensor]:
    """Prompts of all sequences packed into one step, then one token of each at a time."""
    prompts = [len(tokens) - NUM_DECODED for tokens in sequences]
    spans = [[(0, prompt) for prompt in prompts]]
    spans += [[(prompt + i, prompt + i + 1) for prompt in prompts] for i in range(NUM_DECODED)]
    logits: list[list[torch.Tensor]] = [[] for _ in sequences]
    for span in spans:
        step = Step(
            sequences=tuple(range(len(sequences))),
            tokens=tuple(tuple(tokens[a:b]) for tokens, (a, b) in zip(sequences, span, strict=True)),
            past=tuple(a for a, _ in span),
        )
        ranks = world.logits(step)
        assert all(torch.equal(ranks[0], other) for other in ranks[1:])
        for index, part in enumerate(ranks[0].split([b - a for a, b in span])):
            logits[index].append(part)
    return [torch.cat(parts) for parts in logits]


@pytest.mark.usefixtures("recorder")
@pytest.mark.parametrize("plant", ["window", "scale", "heads"])
def test_a_planted_error_shows(plant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window one token too long, a sum in place of the mean, rows of queries and keys in the wrong order."""
    from pt_trtllm.engine.tensorrt_llm import weights
    from pt_trtllm.engine.tensorrt_llm.support import attention_windows

    case = next(param.values[0] for param in SUPPORTED if param.values[0].name == "as_many_kv_heads")
    model = build_model(case.config)
    save_checkpoint(model, case.config, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "checkpoint", ConvertOptions(source="tamm", world_size=4))
    if plant == "heads":
        monkeypatch.setattr(weights, "_interleave_heads", lambda qkv, heads, model: qkv)
    config, networks = define(tmp_path / "checkpoint")
    for network in networks:
        for node in network.nodes:
            if plant == "scale" and node.op == "mul_scalar" and node.attributes["value"] == 0.25:
                node.attributes["value"] = 1.0
    windows = attention_windows(config.checkpoint.model, LIMITS.max_seq_len)
    world = RecordedWorld(networks, [window + (plant == "window") for window in windows])
    tokens = torch.randint(97, (12,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        error = relative_error(logits_by_steps(world, [tokens])[0][:, :97], logits_of(model, tokens))
    assert error > 100 * FLOAT32_LOGITS


@pytest.mark.usefixtures("recorder")
def test_the_runner_answers_on_rank_0_with_what_follows_the_prompts(make_source: Any, tmp_path: Path) -> None:
    from pt_trtllm.engine.tensorrt_llm.generate import generate

    convert(make_source(), tmp_path / "checkpoint", ConvertOptions(source="tamm", world_size=4))
    build(tmp_path / "checkpoint", tmp_path / "engine", BuildOptions(backend="tensorrt-llm", limits=LIMITS))
    assert generate(tmp_path / "engine", [[5, 6, 7], [9]], 2, -1, rank=0) == [[5, 5], [9, 9]]
    assert generate(tmp_path / "engine", [[5, 6, 7]], 2, -1, rank=3) == []


def collectives(network: Network) -> list[Node]:
    return [node for node in network.nodes if node.op in ("allreduce", "allgather")]


@pytest.mark.usefixtures("recorder")
@pytest.mark.parametrize("combine", ["mean", "sum"])
@pytest.mark.parametrize("pattern", [["dense"], ["dense", "sparse"]])
def test_tracks_meet_l_over_d_times_and_nowhere_inside_a_block(
    combine: str, pattern: list[str], make_source: Any, tmp_path: Path
) -> None:
    source = make_source(tracks_combine_op=combine, feed_forward_layer_pattern=pattern)
    convert(source, tmp_path / "checkpoint", ConvertOptions(source="tamm", world_size=4))
    _, networks = define(tmp_path / "checkpoint")
    for network in networks:
        found = collectives(network)
        assert [(node.op, node.scope) for node in found] == [
            ("allreduce", "transformer.layers.1"),  # in the layer that ends a segment, not in its attention or mlp
            ("allreduce", "transformer.layers.3"),
            ("allgather", "lm_head"),
        ]
        assert all(node.attributes["group"] == [0, 1, 2, 3] for node in found)
        assert all(node.attributes["strategy"] == AllReduceStrategy.AUTO for node in found[:2])
        for node in found[:2]:
            before = node.inputs[0].node
            if combine == "mean":  # the scale is the last thing before the sum
                assert (before.op, before.attributes["value"]) == ("mul_scalar", 0.25)
            else:
                assert before.op == "add"


@pytest.mark.usefixtures("recorder")
def test_a_split_track_sums_within_its_ranks_twice_per_layer(make_source: Any, tmp_path: Path) -> None:
    source = make_source(num_tracks=2)
    convert(source, tmp_path / "checkpoint", ConvertOptions(source="tamm", world_size=4))
    _, networks = define(tmp_path / "checkpoint")
    for rank, network in enumerate(networks):
        sums = [node for node in collectives(network) if node.op == "allreduce"]
        inside = [node for node in sums if re.search(r"\.(attention|mlp)", node.scope)]
        assert len(inside) == 2 * 4
        assert all(node.attributes["group"] == [rank // 2 * 2, rank // 2 * 2 + 1] for node in inside)
        fusions = [node for node in sums if node not in inside]
        assert [node.attributes["group"] for node in fusions] == [[rank % 2, rank % 2 + 2]] * 2
        assert all(node.attributes["strategy"] == AllReduceStrategy.NCCL for node in sums)  # parts of the world


@pytest.mark.usefixtures("recorder")
def test_numbers_of_ranks_without_custom_kernels_use_nccl(make_source: Any, tmp_path: Path) -> None:
    source = make_source(num_tracks=3, hidden_dim=48)
    convert(source, tmp_path / "checkpoint", ConvertOptions(source="tamm", world_size=3))
    _, networks = define(tmp_path / "checkpoint")
    sums = [node for node in collectives(networks[0]) if node.op == "allreduce"]
    assert {node.attributes["strategy"] for node in sums} == {AllReduceStrategy.NCCL}


@pytest.mark.usefixtures("recorder")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_networks_of_half_precision_are_strongly_typed(dtype: str, make_source: Any, tmp_path: Path) -> None:
    """The recorder refuses arithmetic of different types, as TensorRT does."""
    convert(make_source(), tmp_path / "checkpoint", ConvertOptions(source="tamm", world_size=4, dtype=dtype))
    _, networks = define(tmp_path / "checkpoint")
    fusions = [node for node in collectives(networks[0]) if node.op == "allreduce"]
    assert {node.inputs[0].dtype for node in fusions} == {dtype}
    assert networks[0].outputs["logits"].dtype == "float32"


@pytest.mark.usefixtures("recorder")
def test_fused_products_with_their_own_sums_are_refused(make_source: Any, tmp_path: Path) -> None:
    convert(make_source(), tmp_path / "checkpoint", ConvertOptions(source="tamm", world_size=4))
    from tensorrt_llm.builder import build as build_engine

    from pt_trtllm.engine.tensorrt_llm.backend import build_config, rank_model, settle

    checkpoint, _ = open_checkpoint(tmp_path / "checkpoint")
    config = EngineConfig(backend="tensorrt-llm", checkpoint=checkpoint, limits=LIMITS)
    settle(checkpoint, LIMITS, BackendOptions())
    made = build_config(config, BackendOptions())
    made.plugin_config.gemm_allreduce_plugin = "float16"
    with pytest.raises(ValueError, match="gemm_allreduce_plugin would sum inside blocks"):
        build_engine(rank_model(tmp_path / "checkpoint", config, 0), made)


# --------------------------------------------------------------------------------------------------- the engine folder


@pytest.mark.usefixtures("recorder")
def test_an_engine_folder_is_readable_by_both_runtimes(make_source: Any, tmp_path: Path) -> None:
    """Our own reader, and the keys that TensorRT-LLM's C++ runtime reads; windows are in its runtime defaults."""
    convert(make_source(), tmp_path / "checkpoint", ConvertOptions(source="tamm", world_size=4))
    build(tmp_path / "checkpoint", tmp_path / "engine", BuildOptions(backend="tensorrt-llm", limits=LIMITS))
    config, _ = open_bundle(tmp_path / "engine")
    assert (config.backend, config.mapping.world_size) == ("tensorrt-llm", 4)
    assert config.limits == LIMITS
    written = json.loads((tmp_path / "engine" / "config.json").read_text())
    assert written["version"] == "1.2.1"
    assert written["build_config"]["plugin_config"]["gemm_allreduce_plugin"] is None
    pretrained = written["pretrained_config"]
    assert pretrained["runtime_defaults"] == {"max_attention_window": [4, 32, 4, 32]}
    assert pretrained["mapping"]["tp_size"] == 4
    assert (pretrained["num_attention_heads"], pretrained["num_key_value_heads"]) == (16, 8)  # all tracks'
    assert (pretrained["head_size"], pretrained["hidden_size"] % 4) == (16, 0)
    assert {path.name for path in (tmp_path / "engine").glob("*.engine")} == {f"rank{r}.engine" for r in range(4)}
    from pt_trtllm.engine.tensorrt_llm.config import PTConfig

    assert PTConfig(**pretrained).rope_positions == LIMITS.max_seq_len  # the Python runner reads it back like this


@pytest.mark.usefixtures("recorder")
def test_our_runtime_refuses_such_engines_and_says_how_to_run_them(make_source: Any, tmp_path: Path) -> None:
    convert(make_source(), tmp_path / "checkpoint", ConvertOptions(source="tamm", world_size=4))
    build(tmp_path / "checkpoint", tmp_path / "engine", BuildOptions(backend="tensorrt-llm", limits=LIMITS))
    with pytest.raises(EngineError, match=r"mpirun -n 4 python -m pt_trtllm\.engine\.tensorrt_llm\.generate"):
        LLM(tmp_path / "engine")
