"""The layers made for language models, caches over several steps, and collectives of several ranks, evaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

trt = pytest.importorskip("tensorrt_rtx")

from pt_trtllm.testing.network_evaluator import CollectiveLog, NotEvaluated, World  # noqa: E402
from pt_trtllm.testing.small_network import Network, computed  # noqa: E402

pytestmark = pytest.mark.unit

RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


# ----------------------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rotary_dim", [0, 4])
def test_rotary_embedding(interleaved: bool, rotary_dim: int) -> None:
    x, positions = floats(2, 3, 5, 8), RNG.integers(0, 16, (2, 5), dtype=np.int32)
    pairs = (rotary_dim or 8) // 2
    angles = np.arange(16)[:, None] * 0.5 ** np.arange(pairs)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def define(n: Network) -> Any:
        layer = n.trt.add_rotary_embedding(n.input(x), n.constant(cos), n.constant(sin), interleaved, rotary_dim)
        layer.set_input(3, n.input(positions))
        return layer

    expected = x.copy()
    for batch, head, token, pair in np.ndindex(2, 3, 5, pairs):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + pairs)
        turned = complex(x[batch, head, token, first], x[batch, head, token, second])
        turned *= np.exp(1j * angles[positions[batch, token], pair])
        expected[batch, head, token, [first, second]] = turned.real, turned.imag
    assert np.allclose(computed(define), expected, atol=1e-5)


def attention_of_one_query(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    weights = np.exp(keys @ query)
    return weights @ values / weights.sum()


@pytest.mark.parametrize("causal", ["NONE", "UPPER_LEFT", "LOWER_RIGHT"])
@pytest.mark.parametrize("lengths", [None, (7, 4)])
def test_attention_with_grouped_heads(causal: str, lengths: tuple[int, int] | None) -> None:
    query, key, value = floats(2, 4, 3, 8), floats(2, 2, 7, 8), floats(2, 2, 7, 8)

    def define(n: Network) -> Any:
        kind = trt.CausalMaskKind.__members__[causal]
        softmax = trt.AttentionNormalizationOp.SOFTMAX
        attention = n.trt.add_attention_v2(n.input(query), n.input(key), n.input(value), softmax, kind)
        if lengths:
            attention.key_value_lengths = n.input(np.array(lengths, np.int32))
        return attention

    expected = np.zeros_like(query)
    for batch, head, token in np.ndindex(2, 4, 3):
        seen = (lengths or (7, 7))[batch]
        if causal == "UPPER_LEFT":
            seen = min(seen, token + 1)
        elif causal == "LOWER_RIGHT":
            seen = seen - 3 + token + 1
        rows = key[batch, head // 2, :seen], value[batch, head // 2, :seen]
        expected[batch, head, token] = attention_of_one_query(query[batch, head, token], *rows)
    assert np.allclose(computed(define), expected, atol=1e-5)


@pytest.mark.parametrize("additive", [False, True])
def test_attention_with_a_mask(additive: bool) -> None:
    query, key, value = floats(2, 2, 3, 8), floats(2, 2, 5, 8), floats(2, 2, 5, 8)
    mask = RNG.random((2, 1, 3, 5)) < 0.7
    mask[..., 0] = True
    given = np.where(mask, 0, -1e9).astype(np.float32) if additive else mask

    def define(n: Network) -> Any:
        softmax, none = trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.NONE
        attention = n.trt.add_attention_v2(n.input(query), n.input(key), n.input(value), softmax, none)
        attention.mask = n.input(given)
        return attention

    expected = np.zeros_like(query)
    for batch, head, token in np.ndindex(2, 2, 3):
        seen = mask[batch, 0, token]
        rows = key[batch, head][seen], value[batch, head][seen]
        expected[batch, head, token] = attention_of_one_query(query[batch, head, token], *rows)
    assert np.allclose(computed(define), expected, atol=1e-5)


def test_attention_over_packed_sequences() -> None:
    lengths = np.array([0, 2, 5], np.int32)
    query, key, value = floats(5, 2, 8), floats(5, 2, 8), floats(5, 2, 8)

    def define(n: Network) -> Any:
        softmax, causal = trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.LOWER_RIGHT
        q, k, v = (n.input(t, (-1, 2, 8)) for t in (query, key, value))
        attention = n.trt.add_attention_v2(q, k, v, softmax, causal)
        attention.query_form = attention.key_value_form = trt.AttentionIOForm.PACKED_NHD
        attention.query_lengths = n.input(lengths, (-1,))
        attention.key_value_lengths = n.input(lengths, (-1,))
        return attention

    expected = np.zeros_like(query)
    for token, head in np.ndindex(5, 2):
        first = 0 if token < 2 else 2
        rows = key[first : token + 1, head], value[first : token + 1, head]
        expected[token, head] = attention_of_one_query(query[token, head], *rows)
    assert np.allclose(computed(define), expected, atol=1e-5)


def cache_network(num_tokens: int) -> tuple[Network, Any]:
    network = Network()
    cache = network.trt.add_input("cache", trt.float32, (-1, 2, 6, 4))
    update = network.trt.add_input("update", trt.float32, (-1, 2, num_tokens, 4))
    starts = network.trt.add_input("starts", trt.int32, (-1,))
    output = network.trt.add_kv_cache_update(cache, update, starts, trt.KVCacheMode.LINEAR).get_output(0)
    output.name = "updated"
    network.trt.mark_output(output)
    total = network.trt.add_reduce(output, trt.ReduceOperation.SUM, 0b1010, False).get_output(0)
    total.name = "total"
    network.trt.mark_output(total)
    return network, output


def test_a_kv_cache_keeps_what_earlier_steps_wrote() -> None:
    network, _ = cache_network(-1)
    world = World([network.trt])
    world.new_caches(batch_size=2, max_length=6)
    for starts, new in (((0, 0), floats(2, 2, 3, 4)), ((3, 1), floats(2, 2, 1, 4))):
        feed = {"update": torch.from_numpy(new), "starts": torch.tensor(starts, dtype=torch.int32)}
        (values,) = world.step([feed])
        assert list(values) == ["total"]  # the cache itself stays inside
        for sequence, start in enumerate(starts):
            rows = values["total"][sequence, start : start + new.shape[2]].numpy()
            assert np.allclose(rows, new[sequence].sum((0, 2)), atol=1e-5)
    assert float(values["total"][0, 5]) == 8000.0  # never written


def test_writing_beyond_a_cache_is_an_error() -> None:
    network, _ = cache_network(3)
    world = World([network.trt])
    world.new_caches(batch_size=1, max_length=6)
    with pytest.raises(AssertionError, match="rows 4 to 7 of a cache of 6"):
        world.step([{"update": torch.zeros(1, 2, 3, 4), "starts": torch.tensor([4], dtype=torch.int32)}])


def test_mixture_of_experts() -> None:
    x, scores = floats(1, 3, 8), np.abs(floats(1, 3, 2))
    selected = np.array([[[0, 3], [2, 1], [3, 0]]], np.int32)
    gate, up, down = floats(4, 8, 5), floats(4, 8, 5), floats(4, 5, 8)

    def define(n: Network) -> Any:
        layer = n.trt.add_moe(n.input(x), n.input(selected), n.input(scores))
        layer.set_gated_weights(n.constant(gate), n.constant(up), n.constant(down), trt.MoEActType.SILU)
        return layer

    expected = np.zeros_like(x)
    for token, choice in np.ndindex(3, 2):
        expert = selected[0, token, choice]
        gated = x[0, token] @ gate[expert]
        hidden = gated / (1 + np.exp(-gated)) * (x[0, token] @ up[expert])
        expected[0, token] += scores[0, token, choice] * (hidden @ down[expert])
    assert np.allclose(computed(define), expected, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ collectives


def collective_network(op: Any, reduce_op: Any, group: Sequence[int], num_ranks: int) -> Any:
    network = Network()
    value = network.trt.add_input("x", trt.float32, (-1, 3))
    layer = network.trt.add_dist_collective(value, op, reduce_op, -1, np.array(group, np.int64))
    layer.num_ranks = num_ranks
    output = layer.get_output(0)
    output.name = "y"
    network.trt.mark_output(output)
    return network


def run_collectives(*networks: Any, log: CollectiveLog) -> tuple[list[np.ndarray], list[np.ndarray], World]:
    values = [floats(2, 3) for _ in networks]
    world = World([network.trt for network in networks], log)
    results = world.step([{"x": torch.from_numpy(value)} for value in values])
    return values, [result["y"].numpy() for result in results], world


@pytest.mark.parametrize(("reduce_op", "function"), [("SUM", np.sum), ("AVG", np.mean), ("MAX", np.max)])
def test_all_reduce_over_groups(reduce_op: str, function: Callable[..., np.ndarray]) -> None:
    op, kind = trt.CollectiveOperation.ALL_REDUCE, trt.ReduceOperation.__members__[reduce_op]
    with CollectiveLog(trt) as log:
        networks = [collective_network(op, kind, [rank % 2, rank % 2 + 2], 2) for rank in range(4)]
    values, results, world = run_collectives(*networks, log=log)
    for rank, result in enumerate(results):
        assert np.allclose(result, function(np.stack([values[rank % 2], values[rank % 2 + 2]]), axis=0), atol=1e-6)
    assert world.num_collectives == 2


def test_all_gather_and_reduce_scatter_along_the_first_axis() -> None:
    gather, scatter = trt.CollectiveOperation.ALL_GATHER, trt.CollectiveOperation.REDUCE_SCATTER
    with CollectiveLog(trt) as log:
        gathers = [collective_network(gather, trt.ReduceOperation.NONE, [], 2) for _ in range(2)]
        scatters = [collective_network(scatter, trt.ReduceOperation.SUM, [0, 1], 2) for _ in range(2)]
    values, results, _ = run_collectives(*gathers, log=log)
    assert all(np.array_equal(result, np.concatenate(values)) for result in results)
    values, results, _ = run_collectives(*scatters, log=log)
    assert all(np.allclose(result, sum(values)[rank : rank + 1]) for rank, result in enumerate(results))


def test_ranks_that_would_wait_for_each_other_are_named() -> None:
    op = trt.CollectiveOperation.ALL_REDUCE
    with CollectiveLog(trt) as log:
        networks = [
            collective_network(op, kind, [0, 1], 2) for kind in (trt.ReduceOperation.SUM, trt.ReduceOperation.AVG)
        ]
    with pytest.raises(AssertionError, match=r"wait for each other: rank 0 in .*SUM.*rank 1 in .*AVG"):
        run_collectives(*networks, log=log)


def test_a_collective_whose_arguments_were_not_noted_is_refused() -> None:
    network = collective_network(trt.CollectiveOperation.ALL_REDUCE, trt.ReduceOperation.SUM, [0], 1)
    with pytest.raises(NotEvaluated, match="no CollectiveLog was open"):
        run_collectives(network, log=CollectiveLog(trt))


# --------------------------------------------------------------------------------------------------------- refusals


def test_unknown_layers_and_parameters_raise() -> None:
    with pytest.raises(NotEvaluated, match="of kind LRN"):
        computed(lambda n: n.trt.add_lrn(n.input(floats(1, 2, 4, 4)), 3, 1.0, 1.0, 1.0))
    with pytest.raises(NotEvaluated, match="fill RANDOM_UNIFORM"):
        computed(lambda n: n.trt.add_fill((2,), trt.FillOperation.RANDOM_UNIFORM, trt.float32))
    with pytest.raises(AssertionError, match="index 5 of 3 elements"):
        computed(lambda n: n.trt.add_gather(n.input(floats(2, 3)), n.input(np.array([5], np.int32)), 1))


def test_inputs_must_fit_the_network() -> None:
    network = Network()
    output = network.trt.add_identity(network.input(floats(2, 3, 4))).get_output(0)
    network.feeds["input0"] = torch.zeros(2, 3, 5)
    with pytest.raises(NotEvaluated, match=r"input0: computed .* \[2, 3, 5\], the network declares FLOAT \[2, 3, 4\]"):
        network.outputs(output)
