"""The track-fusion layer of a TensorRT network, in Python over the C ABI.

The twin of ``plugins/src/tensorrt`` for installations without TensorRT's C++ headers: the same name, version, fields
and tensors, so that networks and engines need not know which of the two they meet. TensorRT calls back into Python for
every launch; replayed CUDA graphs do not.
"""

# Classes whose bases are known at run time only:
# mypy: disable-error-code="misc"
from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from pt_trtllm.comm.coding import CODECS
from pt_trtllm.comm.cuda_abi import ALGORITHMS, REDUCTIONS, Arguments, check, load_library
from pt_trtllm.errors import CommunicationError

PLUGIN_NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE = "PtTrackFusion", "1", "pt"
FIELDS_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class FusionFields:
    """What an engine remembers: logical facts only, equal on all ranks."""

    channel: str
    """Name under which the application registers the rank's channel (`CudaFusion.register`)."""
    num_ranks: int
    reduction: int = REDUCTIONS["mean"]
    has_residual: int = 0
    has_norm: int = 0
    eps: float = 1e-5
    codec: int = CODECS.index("none")
    """pt_codec: how messages travel. Engines from before there was one have none."""
    version: int = FIELDS_VERSION

    def __post_init__(self) -> None:
        if self.version != FIELDS_VERSION:
            raise CommunicationError(
                f"{PLUGIN_NAME}: the engine has fields of version {self.version}, expected {FIELDS_VERSION}; build the "
                f"engine again"
            )
        flags_good = self.has_residual in (0, 1) and self.has_norm in (0, 1) and self.reduction in (0, 1)
        if not self.channel or self.num_ranks < 1 or not flags_good or not 0 <= self.eps < math.inf:
            raise CommunicationError(
                f"{PLUGIN_NAME}: the fields are {self}, expected a name, ranks and flags of 0 or 1"
            )
        if not 0 <= self.codec < len(CODECS):
            known = ", ".join(f"{number} ({name})" for number, name in enumerate(CODECS))
            raise CommunicationError(f"{PLUGIN_NAME}: codec is {self.codec}, expected one of {known}")

    @property
    def num_inputs(self) -> int:
        return 1 + self.has_residual + self.has_norm

    def collection(self, trt: Any) -> Any:
        """In TensorRT's form."""
        kinds = {"i": trt.PluginFieldType.INT32, "f": trt.PluginFieldType.FLOAT32, "b": trt.PluginFieldType.CHAR}
        entries = [
            trt.PluginField(name, array, kinds["b" if array.itemsize == 1 else array.dtype.kind])
            for name, array in _arrays(self).items()
        ]
        return trt.PluginFieldCollection(entries)

    @classmethod
    def parse(cls, collection: Any) -> FusionFields:
        found: dict[str, Any] = {}
        known = {field.name for field in fields(cls)}
        for field in collection:
            if field.name not in known:
                raise CommunicationError(f"{PLUGIN_NAME}: there is no field {field.name!r}")
            if field.name == "channel":
                data = field.data
                found[field.name] = (
                    (data if isinstance(data, bytes) else np.asarray(data).tobytes()).decode().strip("\0")
                )
            else:
                value = np.asarray(field.data).reshape(-1)[0]
                found[field.name] = float(value) if field.name == "eps" else int(value)
        missing = {"channel", "num_ranks"} - set(found)
        if missing:
            raise CommunicationError(f"{PLUGIN_NAME}: missing fields: {', '.join(sorted(missing))}")
        return cls(**found)


@functools.cache
def _arrays(fusion: FusionFields) -> dict[str, np.ndarray[Any, Any]]:
    """Values as TensorRT reads them. It keeps pointers into them: they live as long as the process."""
    arrays = {}
    for field in fields(fusion):
        value = getattr(fusion, field.name)
        if isinstance(value, str):
            arrays[field.name] = np.frombuffer(value.encode(), dtype=np.int8)
        else:
            arrays[field.name] = np.array([value], dtype=np.float32 if isinstance(value, float) else np.int32)
    return arrays


def launch(fusion: FusionFields, channel: int, described: list[Any], inputs: Any, outputs: Any, stream: int) -> None:
    """Fuses buffers of `described` inputs: pairs of shape and number of the type (that of pt_dtype)."""
    shape, dtype = described[0]
    gamma_shape, gamma_dtype = described[-1] if fusion.has_norm else ((0,), dtype)
    if fusion.has_norm and (gamma_shape[-1] != shape[-1] or len(gamma_shape) > 2):
        raise CommunicationError(f"{PLUGIN_NAME}: gamma is {list(gamma_shape)}, expected [.., {shape[-1]}]")
    arguments = Arguments(
        struct_bytes=ctypes.sizeof(Arguments),
        dtype=dtype,
        reduction=fusion.reduction,
        algorithm=ALGORITHMS["auto"],
        tokens=math.prod(shape[:-1]),
        hidden=shape[-1],
        x=inputs[0],
        residual=inputs[1] if fusion.has_residual else None,
        h=outputs[0],
        gamma=inputs[-1] if fusion.has_norm else None,
        norm_out=outputs[1] if fusion.has_norm else None,
        num_gammas=math.prod(gamma_shape[:-1]) if fusion.has_norm else 0,
        gamma_dtype=gamma_dtype,
        eps=fusion.eps,
        codec=fusion.codec,
    )
    check(load_library().pt_cuda_fusion_fuse(channel, ctypes.byref(arguments), stream or None))


def find_channel(fusion: FusionFields) -> int:
    library = load_library()
    channel: int | None = library.pt_cuda_fusion_find(fusion.channel.encode())
    if channel is None:
        raise CommunicationError(
            f"{PLUGIN_NAME}: this process has no channel {fusion.channel!r}; open a CudaFusion and register it before "
            f"the execution context is created"
        )
    size = library.pt_cuda_fusion_size(channel)
    if size != fusion.num_ranks:
        raise CommunicationError(
            f"{PLUGIN_NAME}: channel {fusion.channel!r} has {size} ranks, the engine was built for {fusion.num_ranks}"
        )
    return channel


def make_creator(trt: Any) -> Any:
    """A creator for `trt.get_plugin_registry().register_creator`; keep it alive as long as it is registered.

    `trt` is the module `tensorrt`, 10.x or 11.x: nothing here imports it.
    """
    dtypes = {trt.DataType.FLOAT: 0, trt.DataType.BF16: 1, trt.DataType.HALF: 2}

    class TrackFusionPlugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
        def __init__(self, fusion: FusionFields, phase: Any, channel: int | None = None) -> None:
            for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
                base.__init__(self)
            self.plugin_name, self.plugin_version, self.plugin_namespace = PLUGIN_NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE
            self.num_outputs = 1 + fusion.has_norm
            self.timing_cache_id = ""  # none: one rank's time means nothing to the others
            self.fusion, self.phase, self.channel = fusion, phase, channel

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return TrackFusionPlugin(self.fusion, self.phase, self.channel)

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            if len(inputs) != self.fusion.num_inputs:
                raise CommunicationError(f"{PLUGIN_NAME}: {len(inputs)} inputs, expected {self.fusion.num_inputs}")

        def get_output_data_types(self, input_types: Any) -> Any:
            return [input_types[0]] * self.num_outputs

        def get_output_shapes(self, inputs: Any, shape_inputs: Any, builder: Any) -> Any:
            x, gamma = list(inputs[0]), list(inputs[-1])
            shapes = [x] if not self.fusion.has_norm else [x, [*gamma[:-1], *x]]
            return [trt.DimsExprs(shape) for shape in shapes]

        def supports_format_combination(self, position: int, tensors: Any, num_inputs: int) -> bool:
            tensor, x = tensors[position].desc, tensors[0].desc.type
            if tensor.format != trt.TensorFormat.LINEAR or tensor.type not in dtypes:
                return False
            is_gamma = self.fusion.has_norm and position == self.fusion.num_inputs - 1
            return bool(tensor.type == x or (is_gamma and tensor.type == trt.DataType.FLOAT))

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            return

        def set_tactic(self, tactic: int) -> None:
            return

        def get_valid_tactics(self) -> list[int]:
            return []

        def enqueue(
            self, input_desc: Any, output_desc: Any, inputs: Any, outputs: Any, workspace: int, stream: int
        ) -> None:
            if self.phase == trt.TensorRTPhase.BUILD:
                return  # timed on one rank alone: nothing may wait for a peer
            if self.channel is None:
                raise CommunicationError(f"{PLUGIN_NAME}: enqueue before attach_to_context: there is no channel")
            described = [(tuple(tensor.dims), dtypes[tensor.type]) for tensor in input_desc]
            launch(self.fusion, self.channel, described, inputs, outputs, stream)

        def attach_to_context(self, context: Any) -> Any:
            running = self.phase == trt.TensorRTPhase.RUNTIME
            return TrackFusionPlugin(self.fusion, self.phase, find_channel(self.fusion) if running else None)

        def get_fields_to_serialize(self) -> Any:
            return self.fusion.collection(trt)

    class TrackFusionCreator(trt.IPluginCreatorV3One):
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = PLUGIN_NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE
            self.field_names = FusionFields(channel="pt", num_ranks=1).collection(trt)

        def create_plugin(self, name: str, collection: Any, phase: Any) -> Any:
            return TrackFusionPlugin(FusionFields.parse(collection), phase)

    return TrackFusionCreator()
