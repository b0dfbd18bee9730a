"""Each kind of general layer: a small TensorRT network, evaluated, against the definition written with numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

trt = pytest.importorskip("tensorrt_rtx")
ml_dtypes = pytest.importorskip("ml_dtypes")

from pt_trtllm.testing.small_network import Network, computed  # noqa: E402

pytestmark = pytest.mark.unit

RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


# ---------------------------------------------------------------------------------------------- element by element

X, Y = floats(2, 3, 4), floats(2, 1, 4)
COUNTS, SMALL = RNG.integers(-9, 9, (2, 3), dtype=np.int32), RNG.integers(1, 5, (2, 3), dtype=np.int32)


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("SUM", X + Y),
        ("PROD", X * Y),
        ("MAX", np.maximum(X, Y)),
        ("MIN", np.minimum(X, Y)),
        ("SUB", X - Y),
        ("DIV", X / Y),
        ("FLOOR_DIV", np.floor(X / Y)),
        ("GREATER", X > Y),
        ("LESS", X < Y),
    ],
)
def test_elementwise_operations_broadcast(op: str, expected: np.ndarray) -> None:
    found = computed(lambda n: n.trt.add_elementwise(n.input(X), n.input(Y), trt.ElementWiseOperation.__members__[op]))
    assert np.allclose(found, expected)


def test_division_of_integers_truncates_and_floor_division_floors() -> None:
    def with_op(op: Any) -> np.ndarray:
        return computed(lambda n: n.trt.add_elementwise(n.input(COUNTS), n.input(SMALL), op))

    assert np.array_equal(with_op(trt.ElementWiseOperation.DIV), np.trunc(COUNTS / SMALL).astype(np.int32))
    assert np.array_equal(with_op(trt.ElementWiseOperation.FLOOR_DIV), COUNTS // SMALL)
    assert np.array_equal(with_op(trt.ElementWiseOperation.EQUAL), COUNTS == SMALL)


@pytest.mark.parametrize(
    ("op", "function"),
    [
        ("EXP", np.exp),
        ("NEG", np.negative),
        ("ABS", np.abs),
        ("RECIP", np.reciprocal),
        ("ROUND", np.rint),
        ("FLOOR", np.floor),
        ("COS", np.cos),
        ("SIN", np.sin),
        ("ERF", np.vectorize(math.erf, otypes=[np.float32])),
    ],
)
def test_unary_operations(op: str, function: Callable[[np.ndarray], np.ndarray]) -> None:
    found = computed(lambda n: n.trt.add_unary(n.input(X), trt.UnaryOperation.__members__[op]))
    assert np.allclose(found, function(X), atol=1e-6)


def test_square_root_and_logical_not() -> None:
    positive, bits = np.abs(X), X > 0
    assert np.allclose(computed(lambda n: n.trt.add_unary(n.input(positive), trt.UnaryOperation.SQRT)), positive**0.5)
    assert np.array_equal(computed(lambda n: n.trt.add_unary(n.input(bits), trt.UnaryOperation.NOT)), ~bits)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("SIGMOID", 1 / (1 + np.exp(-X))),
        ("TANH", np.tanh(X)),
        ("RELU", np.maximum(X, 0)),
        ("CLIP", np.clip(X, -0.5, 0.25)),
        ("SCALED_TANH", -0.5 * np.tanh(0.25 * X)),
        ("GELU_ERF", 0.5 * X * (1 + np.vectorize(math.erf)(X / math.sqrt(2)))),
        ("GELU_TANH", 0.5 * X * (1 + np.tanh(math.sqrt(2 / math.pi) * (X + 0.044715 * X**3)))),
    ],
)
def test_activations(kind: str, expected: np.ndarray) -> None:
    def define(n: Network) -> Any:
        layer = n.trt.add_activation(n.input(X), trt.ActivationType.__members__[kind])
        layer.alpha, layer.beta = -0.5, 0.25
        return layer

    assert np.allclose(computed(define), expected, atol=1e-6)


def test_select_cast_and_identity() -> None:
    found = computed(lambda n: n.trt.add_select(n.input(X > 0), n.input(X), n.input(Y)))
    assert np.allclose(found, np.where(X > 0, X, Y))
    assert np.array_equal(computed(lambda n: n.trt.add_cast(n.input(X * 3), trt.int32)), np.trunc(X * 3))
    assert np.array_equal(computed(lambda n: n.trt.add_cast(n.input(COUNTS), trt.bool)), COUNTS != 0)
    assert np.array_equal(computed(lambda n: n.trt.add_identity(n.input(X))), X)


# ------------------------------------------------------------------------------------------------------- constants


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn"])
def test_constants_of_types_that_numpy_lacks_are_read_from_their_memory(name: str) -> None:
    values = floats(3, 5).astype(getattr(ml_dtypes, name))

    def define(n: Network) -> Any:
        if name == "bfloat16":
            return n.trt.add_identity(n.constant(values, trt.bfloat16))
        one = n.constant(np.ones((), np.float32))
        return n.trt.add_dequantize(n.constant(values, trt.fp8), one, trt.float32)

    assert np.array_equal(computed(define), values.astype(np.float32))


def test_values_are_rounded_to_declared_types_only_where_asked() -> None:
    value = np.array([1.0 + 2.0**-9, 3e-9], np.float32)

    def define(n: Network) -> Any:
        return n.trt.add_cast(n.trt.add_cast(n.input(value), trt.bfloat16).get_output(0), trt.float32)

    assert np.array_equal(computed(define), value)
    assert np.array_equal(computed(define, declared_types=True), value.astype(ml_dtypes.bfloat16).astype(np.float32))


# ------------------------------------------------------------------------------------------- reductions and products


@pytest.mark.parametrize(
    ("op", "function"), [("SUM", np.sum), ("AVG", np.mean), ("MAX", np.max), ("MIN", np.min), ("PROD", np.prod)]
)
@pytest.mark.parametrize("keep", [True, False])
def test_reductions_over_a_mask_of_axes(op: str, function: Callable[..., np.ndarray], keep: bool) -> None:
    kind = trt.ReduceOperation.__members__[op]
    found = computed(lambda n: n.trt.add_reduce(n.input(X), kind, 0b101, keep))
    assert np.allclose(found, function(X, axis=(0, 2), keepdims=keep), atol=1e-6)


def test_softmax_over_its_axis() -> None:
    def define(n: Network) -> Any:
        layer = n.trt.add_softmax(n.input(X))
        layer.axes = 1 << 1
        return layer

    assert np.allclose(computed(define), np.exp(X) / np.exp(X).sum(1, keepdims=True), atol=1e-6)


def test_topk_is_sorted_and_takes_the_first_of_equals() -> None:
    value = np.array([[1, 5, 5, 2], [7, 7, 7, 7]], np.float32)
    network = Network()
    layer = network.trt.add_topk(network.input(value), trt.TopKOperation.MAX, 3, 1 << 1, trt.int32)
    values, indices = network.outputs(layer.get_output(0), layer.get_output(1))
    assert values.tolist() == [[5, 5, 2], [7, 7, 7]]
    assert indices.tolist() == [[1, 2, 3], [0, 1, 2]]


@pytest.mark.parametrize(
    ("ops", "shapes", "equation"),
    [
        (("NONE", "NONE"), ((2, 3, 4), (2, 4, 5)), "bij,bjk->bik"),
        (("NONE", "TRANSPOSE"), ((2, 3, 4), (1, 5, 4)), "bij,zkj->bik"),
        (("TRANSPOSE", "NONE"), ((4, 3), (4, 5)), "ji,jk->ik"),
        (("NONE", "VECTOR"), ((2, 3, 4), (2, 4)), "bij,bj->bi"),
        (("VECTOR", "NONE"), ((2, 4), (2, 4, 3)), "bj,bjk->bk"),
    ],
)
def test_matrix_products(ops: tuple[str, str], shapes: tuple[tuple[int, ...], ...], equation: str) -> None:
    x, y = (floats(*shape) for shape in shapes)
    first, second = (trt.MatrixOperation.__members__[op] for op in ops)
    found = computed(lambda n: n.trt.add_matrix_multiply(n.input(x), first, n.input(y), second))
    assert np.allclose(found, np.einsum(equation, x, y), atol=1e-5)
    assert np.allclose(computed(lambda n: n.trt.add_einsum([n.input(x), n.input(y)], equation)), found, atol=1e-5)


def test_normalization_subtracts_the_mean() -> None:
    x, scale, bias = floats(2, 3, 8), floats(1, 1, 8), floats(1, 1, 8)

    def define(n: Network) -> Any:
        layer = n.trt.add_normalization_v2(n.input(x), n.input(scale), n.input(bias), 1 << 2)
        layer.epsilon = 0.01
        return layer

    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    assert np.allclose(computed(define), (x - mean) / np.sqrt(variance + 0.01) * scale + bias, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- layout


def test_shuffle_transposes_reshapes_and_transposes() -> None:
    def define(n: Network) -> Any:
        layer = n.trt.add_shuffle(n.input(X))
        layer.first_transpose = trt.Permutation([2, 0, 1])
        layer.reshape_dims = (0, -1)
        layer.second_transpose = trt.Permutation([1, 0])
        return layer

    assert np.array_equal(computed(define), X.transpose(2, 0, 1).reshape(4, -1).T)


def test_shuffle_by_a_shape_tensor() -> None:
    def define(n: Network) -> Any:
        layer = n.trt.add_shuffle(n.input(X, (-1, 3, 4)))
        layer.set_input(1, n.constant(np.array([3, -1], np.int64)))
        return layer

    assert np.array_equal(computed(define), X.reshape(3, -1))


def test_squeeze_unsqueeze_and_concatenation() -> None:
    axes = np.array([1], np.int64)
    assert np.array_equal(computed(lambda n: n.trt.add_squeeze(n.input(Y), n.constant(axes))), Y[:, 0])
    assert np.array_equal(computed(lambda n: n.trt.add_unsqueeze(n.input(Y), n.constant(axes))), Y[:, None])

    def define(n: Network) -> Any:
        layer = n.trt.add_concatenation([n.input(X), n.input(Y)])
        layer.axis = 1
        return layer

    assert np.array_equal(computed(define), np.concatenate([X, Y], 1))


def test_slices_with_steps_and_by_tensors() -> None:
    assert np.array_equal(
        computed(lambda n: n.trt.add_slice(n.input(X), (0, 2, 1), (2, 2, 2), (1, -2, 2))), X[:, ::-2, 1::2]
    )

    def by_tensors(n: Network) -> Any:
        layer = n.trt.add_slice(n.input(X), (0, 0, 0), (0, 0, 0), (1, 1, 1))
        layer.set_input(1, n.constant(np.array([1, 0, 2], np.int64)))
        layer.set_input(2, n.constant(np.array([1, 3, 2], np.int64)))
        return layer

    assert np.array_equal(computed(by_tensors), X[1:2, :, 2:4])


def test_slices_beyond_the_end() -> None:
    def define(mode: Any) -> Callable[[Network], Any]:
        def layer_of(n: Network) -> Any:
            layer = n.trt.add_slice(n.input(X, (-1, 3, 4)), (0, 0, 2), (2, 3, 4), (1, 1, 1))
            layer.mode = mode
            if mode == trt.SampleMode.FILL:
                layer.set_input(4, n.constant(np.array(7.0, np.float32)))
            return layer

        return layer_of

    pad = [(0, 0), (0, 0), (0, 2)]
    assert np.array_equal(computed(define(trt.SampleMode.FILL)), np.pad(X[..., 2:], pad, constant_values=7))
    assert np.array_equal(computed(define(trt.SampleMode.CLAMP)), np.pad(X[..., 2:], pad, mode="edge"))
    assert np.array_equal(computed(define(trt.SampleMode.WRAP)), X[..., [2, 3, 0, 1]])


def test_gathers() -> None:
    index = np.array([[2, 0], [1, 1]], np.int32)
    assert np.array_equal(computed(lambda n: n.trt.add_gather(n.input(X), n.input(index), 1)), np.take(X, index, 1))

    def elementwise_dims(n: Network) -> Any:
        layer = n.trt.add_gather(n.input(X), n.input(index), 1)
        layer.num_elementwise_dims = 1
        return layer

    assert np.array_equal(computed(elementwise_dims), np.stack([X[row][index[row]] for row in range(2)]))
    element = RNG.integers(0, 2, (2, 3, 4)).astype(np.int32)
    found = computed(lambda n: n.trt.add_gather_v2(n.input(X), n.input(element), trt.GatherMode.ELEMENT))
    assert np.array_equal(found, np.take_along_axis(X, element, 0))
    pairs = np.array([[1, 2], [0, 0]], np.int32)
    assert np.array_equal(
        computed(lambda n: n.trt.add_gather_v2(n.input(X), n.input(pairs), trt.GatherMode.ND)), X[[1, 0], [2, 0]]
    )


def test_scatters() -> None:
    updates, rows = floats(2, 4), np.array([[1, 2], [0, 0]], np.int32)
    expected = X.copy()
    expected[[1, 0], [2, 0]] = updates
    found = computed(lambda n: n.trt.add_scatter(n.input(X), n.input(rows), n.input(updates), trt.ScatterMode.ND))
    assert np.array_equal(found, expected)
    data, element, new = floats(2, 5), np.array([[4, 1], [0, 3]], np.int32), floats(2, 2)

    def define(n: Network) -> Any:
        layer = n.trt.add_scatter(n.input(data), n.input(element), n.input(new), trt.ScatterMode.ELEMENT)
        layer.axis = 1
        return layer

    expected = data.copy()
    np.put_along_axis(expected, element, new, 1)
    assert np.array_equal(computed(define), expected)


def test_one_hot_fill_shape_and_cumulative() -> None:
    def one_hot(n: Network) -> Any:
        values, depth = n.constant(np.array([-1, 2], np.float32)), n.constant(np.array(5, np.int32))
        return n.trt.add_one_hot(n.input(SMALL), values, depth, -1)

    assert np.array_equal(computed(one_hot), np.where(np.eye(5)[SMALL] > 0, 2, -1))

    def fill(n: Network) -> Any:
        layer = n.trt.add_fill((3, 4), trt.FillOperation.LINSPACE, trt.int32)
        layer.set_input(1, n.constant(np.array(1, np.int32)))
        layer.set_input(2, n.constant(np.array([100, 10], np.int32)))
        return layer

    assert np.array_equal(computed(fill), 1 + 100 * np.arange(3)[:, None] + 10 * np.arange(4))
    assert computed(lambda n: n.trt.add_shape(n.input(X, (-1, 3, 4)))).tolist() == [2, 3, 4]

    def cumulative(n: Network) -> Any:
        axis = n.constant(np.array(1, np.int32))
        return n.trt.add_cumulative(n.input(X), axis, trt.CumulativeOperation.SUM, True, False)

    assert np.allclose(computed(cumulative), np.cumsum(X, 1) - X, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- quantisation


def test_int8_weights_per_channel() -> None:
    codes, scales = RNG.integers(-128, 128, (6, 8)).astype(np.int8), np.abs(floats(6)) + 0.1

    def define(n: Network) -> Any:
        layer = n.trt.add_dequantize(n.constant(codes), n.constant(scales), trt.float32)
        layer.axis = 0
        return layer

    assert np.allclose(computed(define), codes * scales[:, None])


def test_int4_weights_in_blocks_with_the_first_of_a_pair_in_the_low_bits() -> None:
    codes, scales = RNG.integers(-8, 8, (8, 4)).astype(np.int8), np.abs(floats(2, 4)) + 0.1
    flat = codes.reshape(-1).astype(np.uint8) & 0xF
    packed = flat[0::2] | flat[1::2] << 4

    def define(n: Network) -> Any:
        constant = n.constant(packed, trt.int4, codes.shape)
        layer = n.trt.add_dequantize(constant, n.constant(scales), trt.float32)
        layer.block_shape = (4, 1)
        return layer

    assert np.allclose(computed(define), codes * np.repeat(scales, 4, 0))


def test_quantize_rounds_half_to_even_and_clamps() -> None:
    value = np.array([0.5, 1.5, 2.5, -0.5, 300, -300], np.float32)

    def define(n: Network, kind: Any) -> Any:
        scale = n.constant(np.array(1.0, np.float32))
        codes = n.trt.add_quantize(n.input(value), scale, kind).get_output(0)
        return n.trt.add_dequantize(codes, scale, trt.float32)

    assert computed(lambda n: define(n, trt.int8)).tolist() == [0, 2, 2, 0, 127, -128]
    expected = value.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(computed(lambda n: define(n, trt.fp8)), expected)
