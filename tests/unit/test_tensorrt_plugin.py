"""The TensorRT layer: its Python form under TensorRT-RTX's classes, its C++ form in TensorRT-RTX's registry."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pt_trtllm.comm.coding import CODECS
from pt_trtllm.comm.cuda_abi import load_library
from pt_trtllm.comm.cuda_fusion import CudaFusion
from pt_trtllm.comm.tensorrt_plugin import FusionFields, make_creator
from pt_trtllm.errors import CommunicationError
from pt_trtllm.testing.threads import ThreadExchange

pytestmark = pytest.mark.unit
HEADERS = os.environ.get("PT_TENSORRT_INCLUDE_DIR", "")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trt() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra 'rtx')")


class Desc:
    """What enqueue reads of a tensor description; TensorRT's own cannot be made from Python."""

    def __init__(self, dims: tuple[int, ...], dtype: Any) -> None:
        self.dims, self.type = dims, dtype


def fields(**changes: Any) -> FusionFields:
    return FusionFields(**{"channel": "pt-test", "num_ranks": 2, "has_norm": 1, **changes})


def test_fields_survive_the_way_through_tensorrt(trt: Any) -> None:
    written = fields(reduction=1, has_residual=1, eps=0.25, codec=CODECS.index("fp8"))
    assert FusionFields.parse(written.collection(trt)) == written
    creator = make_creator(trt)
    plugin = creator.create_plugin("layer", written.collection(trt), trt.TensorRTPhase.BUILD)
    assert FusionFields.parse(plugin.clone().get_fields_to_serialize()) == written
    assert "codec" in [field.name for field in creator.field_names]


def test_engines_from_before_there_were_codecs_have_none(trt: Any) -> None:
    older = trt.PluginFieldCollection([field for field in fields().collection(trt) if field.name != "codec"])
    assert FusionFields.parse(older).codec == CODECS.index("none")


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(CommunicationError, match=r"codec is 5, expected one of 0 \(none\), 1 \(int8\)"):
        fields(codec=5)


def test_fields_of_another_version_are_refused(trt: Any) -> None:
    collection, version = fields().collection(trt), np.array([2], dtype=np.int32)
    other = trt.PluginFieldCollection(
        [field for field in collection if field.name != "version"]
        + [trt.PluginField("version", version, trt.PluginFieldType.INT32)]
    )
    with pytest.raises(CommunicationError, match="fields of version 2, expected 1"):
        FusionFields.parse(other)


def test_the_creator_registers_and_nothing_waits_for_a_peer_while_building(trt: Any) -> None:
    registry, creator = trt.get_plugin_registry(), make_creator(trt)
    assert registry.register_creator(creator, "pt")
    assert ("PtTrackFusion", "1") in [(c.name, c.plugin_version) for c in registry.all_creators]
    plugin = creator.create_plugin("layer", fields().collection(trt), trt.TensorRTPhase.BUILD).attach_to_context(None)
    x = torch.ones(2, 8)
    plugin.enqueue([Desc((2, 8), trt.DataType.FLOAT)] * 2, [], [x.data_ptr()] * 2, [x.data_ptr()] * 2, 0, 0)
    assert registry.deregister_creator(creator)


@pytest.mark.parametrize("codec", ["none", "int4"])
def test_two_ranks_fuse_through_the_layer(trt: Any, codec: str) -> None:
    """Ranks of one process need names of their own: the engine's name is that of its rank's channel."""
    exchange = ThreadExchange(2, timeout_s=240.0)

    def rank_main(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        options: dict[str, Any] = {"provider": "host_threads", "timeout_s": 120.0}
        with CudaFusion(rank=rank, size=2, exchange=exchange.for_rank(rank), **options) as channel:
            channel.register(f"pt-test-{rank}")
            written = fields(channel=f"pt-test-{rank}", eps=0.0, codec=CODECS.index(codec))
            built = make_creator(trt).create_plugin("layer", written.collection(trt), trt.TensorRTPhase.RUNTIME)
            plugin = built.attach_to_context(None)
            # The largest value 7 makes the scale of int4 a 1: what is sent of 1.25 and 2.25 are 1 and 2.
            x, gamma = torch.full((3, 16), rank + 1.25), torch.full((2, 16), 2.0)
            x[:, 0] = 7.0
            h, norm = torch.empty(3, 16), torch.empty(2, 3, 16)
            described = [Desc((3, 16), trt.DataType.FLOAT), Desc((2, 16), trt.DataType.FLOAT)]
            plugin.enqueue(described, [], [x.data_ptr(), gamma.data_ptr()], [h.data_ptr(), norm.data_ptr()], 0, 0)
        assert load_library().pt_cuda_fusion_find(f"pt-test-{rank}".encode()) is None
        return h, norm

    with ThreadPoolExecutor(2) as pool:
        ranks = [pool.submit(rank_main, rank) for rank in range(2)]
        for future in reversed(ranks):
            h, norm = future.result(timeout=240)
            mean = 1.75 if codec == "none" else 1.5
            assert torch.equal(h, torch.tensor([7.0] + [mean] * 15).expand(3, 16))
            torch.testing.assert_close(norm, (2 * h / h.square().mean(-1, keepdim=True).sqrt()).expand(2, 3, 16))


def test_a_missing_channel_is_said_when_the_context_is_made(trt: Any) -> None:
    plugin = make_creator(trt).create_plugin("layer", fields().collection(trt), trt.TensorRTPhase.RUNTIME)
    with pytest.raises(CommunicationError, match="no channel 'pt-test'"):
        plugin.attach_to_context(None)


@pytest.mark.skipif(not HEADERS, reason="PT_TENSORRT_INCLUDE_DIR does not name a folder with NvInfer.h")
def test_the_cpp_plugin_compiles_and_loads_into_the_registry(trt: Any, tmp_path: Path) -> None:
    configure = ["cmake", "-S", str(ROOT / "plugins"), "-B", str(tmp_path), f"-DPT_TENSORRT_INCLUDE_DIR={HEADERS}"]
    subprocess.run(configure, check=True, capture_output=True, timeout=240)
    build = ["cmake", "--build", str(tmp_path), "--target", "pt_tensorrt"]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    code = (
        "import sys, tensorrt_rtx as trt\n"
        "registry = trt.get_plugin_registry()\n"
        "registry.load_library(sys.argv[1])\n"
        "print([(c.name, c.plugin_version, c.plugin_namespace) for c in registry.all_creators])\n"
    )
    library = str(tmp_path / "src/tensorrt/libpt_tensorrt.so")
    listed = subprocess.run(
        [sys.executable, "-c", code, library], check=True, capture_output=True, text=True, timeout=240
    )
    assert "('PtTrackFusion', '1', 'pt')" in listed.stdout
