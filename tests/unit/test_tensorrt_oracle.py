"""The network definitions of the TensorRT backend, evaluated on the CPU over all ranks, against references.

Prompts go in in chunks, the last tokens one by one through the KV caches; every token's logits are compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tensorrt_rtx")

from pt_trtllm.checkpoint.convert import ConvertOptions, convert
from pt_trtllm.checkpoint.quantize import Quantization
from pt_trtllm.comm.local import LocalCommunicator
from pt_trtllm.engine.build import BuildOptions, build
from pt_trtllm.engine.bundle import BuildLimits, open_bundle
from pt_trtllm.engine.tensorrt.attention import CachedAttention
from pt_trtllm.engine.tensorrt.layers import Layers
from pt_trtllm.engine.tensorrt.library import load_library
from pt_trtllm.engine.tensorrt.lowering import TensorrtGraph
from pt_trtllm.engine.tensorrt.quantized import linear
from pt_trtllm.mapping import sync_plan
from pt_trtllm.runtime.generate import generate
from pt_trtllm.runtime.options import RuntimeOptions
from pt_trtllm.runtime.request import Request
from pt_trtllm.runtime.sampling import SamplingParams
from pt_trtllm.runtime.worker import open_engine
from pt_trtllm.testing.cases import CASES, Case
from pt_trtllm.testing.numeric import FLOAT32_LOGITS, assert_close, relative_error
from pt_trtllm.testing.reference import build_model, logits_of, save_checkpoint
from pt_trtllm.testing.small_network import Network
from pt_trtllm.testing.tensorrt_world import RanksDiffer, TensorrtWorld

pytestmark = pytest.mark.unit

LIMITS = BuildLimits(max_batch_size=4, max_seq_len=32, max_input_len=16, max_num_tokens=16)
LENGTHS, NUM_DECODED, CHUNK = (6, 14, 4), 3, 8
BOUNDS = {"float16": 5e-3, "bfloat16": 4e-2}
"""Of dense models of these sizes: every result rounded to the type its tensor declares, sums in float32."""
FP8_INPUTS = 3e-2
"""Of the example model, in float32, when the inputs of its products are rounded to e4m3."""
EXAMPLE = Path(__file__).parents[2] / "examples/tiny-pt"
FLOAT8_MATRICES = (
    ".qkv_transform.fused_linear.weight",
    ".output_transform.weight",
    ".hidden_transform.linear_0.weight",
    ".hidden_transform.linear_1.weight",
)


@dataclass(frozen=True)
class Reference:
    folder: Path
    sequences: list[list[int]]
    logits: list[torch.Tensor]
    """Per sequence, float32 [tokens, vocabulary]."""


class References:
    """Made when a test first asks for one."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._made = folder, dict[tuple[str, str], Reference]()

    def __call__(self, name: str, dtype: str = "float32") -> Reference:
        """`dtype` is the type the weights are rounded to; the reference computes in float32."""
        if (name, dtype) not in self._made:
            case = next(case for case in (*CASES, *QUANTISABLE) if case.name == name)
            self._made[name, dtype] = _reference(case.config, self._folder / f"{name}-{dtype}", getattr(torch, dtype))
        return self._made[name, dtype]


@torch.no_grad()
def _reference(config: dict[str, Any], folder: Path, dtype: torch.dtype) -> Reference:
    model = build_model(config)
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    save_checkpoint(model, config, folder)
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(config["vocab_size"], (length,), generator=generator).tolist() for length in LENGTHS]
    return Reference(folder, sequences, [logits_of(model, tokens) for tokens in sequences])


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(tmp_path_factory.mktemp("references"))


def world_of(
    reference: Reference, folder: Path, world_size: int, dtype: str = "float32", **options: Any
) -> TensorrtWorld:
    convert(reference.folder, folder, ConvertOptions(source="tamm", world_size=world_size, dtype=dtype))
    return TensorrtWorld(folder, LIMITS, **options)


def errors(world: TensorrtWorld, reference: Reference) -> list[float]:
    found = world.logits(reference.sequences, NUM_DECODED, CHUNK)
    return [relative_error(*pair) for pair in zip(found, reference.logits, strict=True)]


# Widths that groups of 32 divide, also where a track is cut in two.
QUANTISABLE = (
    Case("quantisable", (1, 4), {"sparse_feed_forward_hidden_dim": 64}),
    Case(
        "quantisable_split",
        (1, 4),
        {"num_tracks": 2, "sparse_feed_forward_hidden_dim": 64, "dense_feed_forward_hidden_dim": 128},
    ),
)
EVERY_SIZE = ("mixed_local_global_dense_sparse", "one_track_is_tensor_parallel", "two_tracks_split_over_two_ranks_each")
"""How weights are divided is checked by `tests/mpi/test_oracle.py`, for every case and size. Here it is the largest
world, and for one case of each kind of world all of them."""
RUNS = [
    pytest.param(case, size, id=f"{case.name}-{size}")
    for case in CASES
    for size in (case.world_sizes if case.name in EVERY_SIZE else case.world_sizes[-1:])
]


@pytest.mark.parametrize(("case", "world_size"), RUNS)
def test_logits_agree_with_the_reference(case: Case, world_size: int, references: References, tmp_path: Path) -> None:
    reference = references(case.name)
    world = world_of(reference, tmp_path / "checkpoint", world_size)
    found = world.logits(reference.sequences, NUM_DECODED, CHUNK)
    for index, expected in enumerate(reference.logits):
        assert_close(found[index], expected, FLOAT32_LOGITS, f"sequence {index}")
    assert world.world.num_collectives == planned_meetings(world)


def planned_meetings(world: TensorrtWorld) -> int:
    """Every group of a collective of the plan meets once: as many meetings as ranks over ranks of a group."""
    config = world.config
    plan = sync_plan(config.checkpoint.model, config.mapping)
    return sum(config.mapping.world_size // point.group_size for point in plan)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("name", "world_size"), [("fused_after_every_layer", 4), ("sum_of_tracks", 2)])
def test_half_precision_networks_stay_within_their_bounds(
    name: str, world_size: int, dtype: str, references: References, tmp_path: Path
) -> None:
    reference = references(name, dtype)
    world = world_of(reference, tmp_path / "checkpoint", world_size, dtype, declared_types=True)
    assert max(errors(world, reference)) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("world_size", [1, 4])
def test_half_precision_weights_are_read_exactly(
    world_size: int, dtype: str, references: References, tmp_path: Path
) -> None:
    """The same networks computed in float32: only their weights are of half precision, and so are the reference's."""
    reference = references("mixed_local_global_dense_sparse", dtype)
    world = world_of(reference, tmp_path / "checkpoint", world_size, dtype)
    assert max(errors(world, reference)) <= FLOAT32_LOGITS


# ---------------------------------------------------------------------------------------------------- planted errors


def _wider_window(patch: pytest.MonkeyPatch) -> None:
    correct = CachedAttention._window
    patch.setattr(CachedAttention, "_window", lambda self, window: correct(self, window + 1))


def _upper_left_causality(patch: pytest.MonkeyPatch) -> None:
    correct = CachedAttention.__init__

    def init(self: CachedAttention, layers: Layers, *rest: Any) -> None:
        correct(self, layers, *rest)
        kinds = layers.trt.CausalMaskKind
        network_class, add = layers.trt.INetworkDefinition, layers.trt.INetworkDefinition.add_attention_v2

        def add_attention_v2(network: Any, q: Any, k: Any, v: Any, op: Any, kind: Any) -> Any:
            return add(network, q, k, v, op, kinds.UPPER_LEFT if kind == kinds.LOWER_RIGHT else kind)

        patch.setattr(network_class, "add_attention_v2", add_attention_v2)

    patch.setattr(CachedAttention, "__init__", init)


def _unscaled_queries(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("pt_trtllm.engine.tensorrt.attention.math.sqrt", lambda value: 1.0)


def _swapped_gate_and_up(patch: pytest.MonkeyPatch) -> None:
    correct = TensorrtGraph.swiglu
    patch.setattr(TensorrtGraph, "swiglu", lambda self, gate, up: correct(self, up, gate))


def _sum_for_mean(patch: pytest.MonkeyPatch) -> None:
    correct = TensorrtGraph._collective

    def collective(self: TensorrtGraph, kind: str, x: Any, op: str, reduce_op: str, group: Any) -> Any:
        return correct(self, kind, x, op, "SUM" if reduce_op == "AVG" else reduce_op, group)

    patch.setattr(TensorrtGraph, "_collective", collective)


def _no_fusion(patch: pytest.MonkeyPatch) -> None:
    correct = TensorrtGraph._collective

    def collective(self: TensorrtGraph, kind: str, x: Any, op: str, reduce_op: str, group: Any) -> Any:
        return x if kind == "track_fusion" else correct(self, kind, x, op, reduce_op, group)

    patch.setattr(TensorrtGraph, "_collective", collective)


def _other_rotary_pairs(patch: pytest.MonkeyPatch) -> None:
    correct = TensorrtGraph.__init__

    def init(self: TensorrtGraph, *arguments: Any, **named: Any) -> None:
        correct(self, *arguments, **named)
        object.__setattr__(self._model, "rope_style", "half")

    patch.setattr(TensorrtGraph, "__init__", init)


@pytest.mark.parametrize(
    "plant",
    [
        _wider_window,
        _upper_left_causality,
        _unscaled_queries,
        _swapped_gate_and_up,
        _sum_for_mean,
        _no_fusion,
        _other_rotary_pairs,
    ],
)
def test_a_planted_error_shows(
    plant: Callable[[pytest.MonkeyPatch], None],
    references: References,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference = references("mixed_local_global_dense_sparse")
    plant(monkeypatch)
    world = world_of(reference, tmp_path / "checkpoint", 2)
    try:
        worst = max(errors(world, reference))
    except RanksDiffer:  # as where ranks hold other tracks and never meet
        return
    assert worst > 100 * FLOAT32_LOGITS


# -------------------------------------------------------------------------- what the reference does not have


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((case.name, method) for case in QUANTISABLE for method in ("int8_wo", "int4_wo")),
        ("quantisable_split", "fp8_wo"),
    ],
)
def test_quantised_networks_agree_with_the_cpu_engine(
    name: str, method: str, references: References, tmp_path: Path
) -> None:
    """The CPU engine computes with the same codes, by other kernels; one rank holds what four do."""
    reference, quantization = references(name), Quantization(method=method, group_size=32)
    for world_size in (1, 4):
        options = ConvertOptions(source="tamm", world_size=world_size, quantization=quantization)
        convert(reference.folder, tmp_path / f"checkpoint{world_size}", options)
    expected = cpu_logits(tmp_path / "checkpoint1", tmp_path / "engine", reference.sequences)
    assert relative_error(expected[0], reference.logits[0]) > 10 * FLOAT32_LOGITS  # quantisation shows
    for world_size in (1, 4):
        world = TensorrtWorld(tmp_path / f"checkpoint{world_size}", LIMITS)
        found = world.logits(reference.sequences, NUM_DECODED, CHUNK)
        for index, logits in enumerate(expected):
            assert_close(found[index], logits, FLOAT32_LOGITS, f"{world_size} ranks, sequence {index}")


@pytest.mark.parametrize("method", ["int8_wo", "int4_wo"])
def test_quantised_weights_keep_their_values_in_half_precision_networks(
    method: str, references: References, tmp_path: Path
) -> None:
    """The same network with every result rounded to its declared type, and without: codes must survive the rounding."""
    reference, quantization = references("quantisable"), Quantization(method=method, group_size=32)
    options = ConvertOptions(source="tamm", world_size=4, dtype="float16", quantization=quantization)
    convert(reference.folder, tmp_path / "checkpoint", options)
    exact, rounded = (
        TensorrtWorld(tmp_path / "checkpoint", LIMITS, declared_types=declared).logits(
            reference.sequences, NUM_DECODED, CHUNK
        )
        for declared in (False, True)
    )
    for index, logits in enumerate(exact):
        assert_close(rounded[index], logits, BOUNDS["float16"], f"sequence {index}")


def test_float8_networks_agree_with_the_reference_of_the_same_weights(references: References, tmp_path: Path) -> None:
    """The reference computes with the values of the codes."""
    reference = references("quantisable")
    options = ConvertOptions(source="tamm", world_size=4, quantization=Quantization(method="fp8_wo"))
    convert(reference.folder, tmp_path / "checkpoint", options)
    case = next(case for case in QUANTISABLE if case.name == "quantisable")
    expected = float8_reference(case.config, reference.sequences)
    found = TensorrtWorld(tmp_path / "checkpoint", LIMITS).logits(reference.sequences, NUM_DECODED, CHUNK)
    for index, logits in enumerate(expected):
        assert_close(found[index], logits, FLOAT32_LOGITS, f"sequence {index}")
        assert relative_error(logits, reference.logits[index]) > 100 * FLOAT32_LOGITS  # rounding shows


@torch.no_grad()
def float8_reference(config: dict[str, Any], sequences: list[list[int]]) -> list[torch.Tensor]:
    """Logits of the model whose matrices are rounded to e4m3, with a scale per output."""
    model = build_model(config)
    for name, parameter in model.named_parameters():
        if name.endswith(FLOAT8_MATRICES):  # [.., in, out]
            parameter.copy_(e4m3_values(parameter, dim=-2))
    return [logits_of(model, tokens) for tokens in sequences]


def test_fp8_rounds_the_inputs_of_a_product_token_by_token() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 32, generator=generator) * torch.tensor([1e-4, 1.0, 0.0, 1e3, 5.0])[:, None]
    codes = torch.randn(2, 8, 32, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 8, generator=generator) + 0.5
    network = Network()
    layers = Layers(load_library("tensorrt_rtx"), network.trt)
    parts = {"weight": codes, "per_channel_scale": scale}
    y = linear(layers, network.input(x.numpy()), "weight", parts, quantizes_inputs=True)
    found = torch.from_numpy(network.outputs(y)[0])
    weights = codes.float() * scale[..., None]
    expected = e4m3_values(x, dim=-1).nan_to_num(0) @ weights.mT
    for token in range(x.shape[1]):
        assert_close(found[:, token], expected[:, token], 1e-5, f"token {token}")
    assert relative_error(found, x @ weights.mT) > 1e-2  # the rounding shows


def test_a_trained_model_bears_rounded_inputs(tmp_path: Path) -> None:
    """Against the CPU engine, which has the same weights and rounds no inputs. Random models bear them far worse."""
    cases = json.loads((EXAMPLE / "reference.json").read_text())["cases"]
    sequences = [case["input_ids"] + case["output_ids"][:10] for case in cases[:2]]
    convert(EXAMPLE, tmp_path / "fp8", ConvertOptions(dtype="float32", quantization=Quantization(method="fp8")))
    expected = cpu_logits(tmp_path / "fp8", tmp_path / "engine", sequences)
    found = TensorrtWorld(tmp_path / "fp8", LIMITS).logits(sequences, NUM_DECODED, CHUNK)
    for index, logits in enumerate(expected):
        assert_close(found[index], logits, FP8_INPUTS, f"sequence {index}")
        assert relative_error(found[index], logits) > 10 * FLOAT32_LOGITS  # rounding shows


def e4m3_values(values: torch.Tensor, dim: int) -> torch.Tensor:
    """To the nearest float of 8 bits, where the largest magnitude along `dim` becomes 448."""
    scale = values.abs().amax(dim, keepdim=True) / 448
    return (values / scale).to(torch.float8_e4m3fn).float() * scale


def cpu_logits(checkpoint: Path, engine_dir: Path, sequences: list[list[int]]) -> list[torch.Tensor]:
    build(checkpoint, engine_dir, BuildOptions(limits=LIMITS))
    engine, options = open_engine(engine_dir, open_bundle(engine_dir)[0], LocalCommunicator(), RuntimeOptions())
    params = SamplingParams(max_tokens=1)
    requests = [Request(prompt_ids=tuple(tokens), params=params, context_logits=True) for tokens in sequences]
    done, _ = generate(engine, requests, options)
    return [torch.stack(sequence.prompt_logits) for sequence in done]


TINY_LLAMA: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3_ROPE},
    "qwen3": {"head_dim": 24, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_style_networks_agree_with_transformers(family: str, tmp_path: Path) -> None:
    """Rotation of halves, norms before it, biases, a head of its own: as tensor parallelism over 1, 2 and 4 ranks."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CONFIG_MAPPING[family](**{**TINY_LLAMA, **FAMILIES[family]})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(97, (length,), generator=generator).tolist() for length in LENGTHS]
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else noise / 5)
        expected = [model.eval()(torch.tensor([tokens])).logits[0] for tokens in sequences]
    model.save_pretrained(tmp_path / "source")
    for world_size in (1, 2, 4):
        folder = tmp_path / f"checkpoint{world_size}"
        convert(tmp_path / "source", folder, ConvertOptions(source="llama", world_size=world_size, dtype="float32"))
        found = TensorrtWorld(folder, LIMITS).logits(sequences, NUM_DECODED, CHUNK)
        for index, logits in enumerate(expected):
            assert_close(found[index], logits, FLOAT32_LOGITS, f"{world_size} ranks, sequence {index}")
