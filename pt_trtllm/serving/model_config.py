"""The `config.pbtxt` of every model, made from the tensor tables through Triton's own protobuf."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from pt_trtllm.serving import tensors
from pt_trtllm.serving.tensors import Tensor

MODELS = ("preprocessing", "tensorrt_llm", "postprocessing", "ensemble", "tensorrt_llm_bls")


def python_model(
    name: str,
    inputs: Iterable[Tensor],
    outputs: Iterable[Tensor],
    *,
    max_batch_size: int,
    parameters: Mapping[str, str],
    decoupled: bool = False,
    instances: int = 1,
    preserve_ordering: bool = False,
    backend: str = "python",
) -> pb.ModelConfig:
    """A complete configuration: nothing is left for the server to guess."""
    config = pb.ModelConfig(name=name, backend=backend, max_batch_size=max_batch_size)
    _declare(config, inputs, outputs)
    config.model_transaction_policy.decoupled = decoupled
    config.instance_group.add(count=instances, kind=pb.ModelInstanceGroup.KIND_CPU)
    if preserve_ordering:
        config.dynamic_batching.preserve_ordering = True
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    return config


def core_model(*, max_batch_size: int, parameters: Mapping[str, str], decoupled: bool) -> pb.ModelConfig:
    """Our Python model over an MPI world."""
    return python_model(
        "tensorrt_llm",
        (*tensors.CORE_INPUTS, *tensors.CORE_PRIVATE_INPUTS),
        _outputs((*tensors.CORE_OUTPUTS, *tensors.CORE_PRIVATE_OUTPUTS), decoupled),
        max_batch_size=max_batch_size,
        parameters=parameters,
        decoupled=decoupled,
    )


def tensorrt_llm_core_model(
    *, max_batch_size: int, parameters: Mapping[str, str], decoupled: bool, max_queue_size: int
) -> pb.ModelConfig:
    """Triton's own C++ backend, which runs TensorRT-LLM engines."""
    config = python_model(
        "tensorrt_llm",
        tensors.CORE_INPUTS,
        tensors.CORE_OUTPUTS,
        max_batch_size=max_batch_size,
        parameters=parameters,
        decoupled=decoupled,
        backend="tensorrtllm",
    )
    config.dynamic_batching.default_queue_policy.max_queue_size = max_queue_size
    return config


def preprocessing_model(*, max_batch_size: int, parameters: Mapping[str, str], instances: int) -> pb.ModelConfig:
    return python_model(
        "preprocessing",
        tensors.PREPROCESSING_INPUTS,
        tensors.PREPROCESSING_OUTPUTS,
        max_batch_size=max_batch_size,
        parameters=parameters,
        instances=instances,
    )


def postprocessing_model(
    *, max_batch_size: int, parameters: Mapping[str, str], instances: int, with_private: bool
) -> pb.ModelConfig:
    """Several instances must keep the order of a stream's pieces. Triton's batcher does, but keeps the pieces of
    clients that have left for itself, so that their requests run on: one instance is the default."""
    inputs: tuple[Tensor, ...] = tensors.POSTPROCESSING_INPUTS
    if with_private:
        optional = (dataclasses.replace(tensor, required=False) for tensor in inputs)
        inputs = (*optional, *tensors.POSTPROCESSING_PRIVATE_INPUTS)
    return python_model(
        "postprocessing",
        inputs,
        tensors.POSTPROCESSING_OUTPUTS,
        max_batch_size=max_batch_size,
        parameters=parameters,
        instances=instances,
        preserve_ordering=instances > 1,
    )


def bls_model(
    *, max_batch_size: int, parameters: Mapping[str, str], instances: int, with_private: bool, decoupled: bool
) -> pb.ModelConfig:
    return python_model(
        "tensorrt_llm_bls",
        (*_ensemble_inputs(with_private), *tensors.BLS_EXTRA_INPUTS),
        _outputs(_ensemble_outputs(with_private), decoupled or not with_private),
        max_batch_size=max_batch_size,
        parameters=parameters,
        decoupled=decoupled,
        instances=instances,
    )


def ensemble_model(*, max_batch_size: int, with_private: bool, decoupled: bool) -> pb.ModelConfig:
    """preprocessing, tensorrt_llm and postprocessing in a row. It is decoupled where a step is."""
    inputs = _ensemble_inputs(with_private)
    outputs = _outputs(_ensemble_outputs(with_private), decoupled or not with_private)
    config = pb.ModelConfig(name="ensemble", platform="ensemble", max_batch_size=max_batch_size)
    _declare(config, inputs, outputs)
    names = {tensor.name for tensor in inputs}
    private = {tensor.name for tensor in (*tensors.CORE_PRIVATE_INPUTS, *tensors.CORE_PRIVATE_OUTPUTS)}

    step = _add_step(config, "preprocessing")
    step.input_map.update(tensors.PREPROCESSING_STEP)
    step.output_map.update({tensor.name: f"_{tensor.name}" for tensor in tensors.PREPROCESSING_OUTPUTS})

    step = _add_step(config, "tensorrt_llm")
    step.input_map.update({name: f"_{source}" for name, source in tensors.PREPROCESSED.items()})
    for tensor in (*tensors.CORE_INPUTS, *(tensors.CORE_PRIVATE_INPUTS if with_private else ())):
        source = tensors.RENAMED.get(tensor.name, tensor.name)
        if tensor.name not in tensors.PREPROCESSED and source in names and tensor.name != "exclude_input_in_output":
            step.input_map[tensor.name] = source
    step.input_map["exclude_input_in_output"] = "exclude_input_in_output"
    if with_private:
        step.output_map["output_ids"] = "output_ids"
    else:
        step.output_map.update({"output_ids": "_output_ids", "sequence_length": "_sequence_length"})
    public = {tensor.name for tensor in outputs}
    for tensor in (*tensors.CORE_OUTPUTS, *tensors.CORE_PRIVATE_OUTPUTS):
        if tensor.name in public and (with_private or tensor.name not in private):
            step.output_map[tensor.name] = tensor.name
    core = step
    step = _add_step(config, "postprocessing")
    if with_private:
        core.output_map["text_piece"], step.input_map["TEXT_PIECE"] = "_text_piece", "_text_piece"
        if decoupled:
            core.output_map["stream_id"], step.input_map["STREAM_ID"] = "_stream_id", "_stream_id"
    else:
        step.input_map.update({"TOKENS_BATCH": "_output_ids", "SEQUENCE_LENGTH": "_sequence_length"})
    step.output_map["OUTPUT"] = "text_output"
    return config


def vllm_model(name: str, *, parameters: Mapping[str, str]) -> pb.ModelConfig:
    """Triton's vLLM backend. vLLM does the batching, and takes the devices it needs."""
    config = python_model(
        name,
        tensors.VLLM_INPUTS,
        tensors.VLLM_OUTPUTS,
        max_batch_size=0,
        parameters=parameters,
        decoupled=True,
        backend="vllm",
    )
    config.instance_group[0].kind = pb.ModelInstanceGroup.KIND_MODEL
    return config


def to_text(config: pb.ModelConfig) -> str:
    return str(text_format.MessageToString(config))


def from_text(text: str) -> pb.ModelConfig:
    return text_format.Parse(text, pb.ModelConfig())


def _ensemble_inputs(with_private: bool) -> tuple[Tensor, ...]:
    hidden = set() if with_private else {t.name for t in tensors.CORE_PRIVATE_INPUTS} - {"stop_words", "bad_words"}
    return tuple(tensor for tensor in tensors.ENSEMBLE_INPUTS if tensor.name not in hidden)


def _ensemble_outputs(with_private: bool) -> tuple[Tensor, ...]:
    hidden = set() if with_private else {*(t.name for t in tensors.END_OUTPUTS), "output_ids"}
    return tuple(tensor for tensor in tensors.ENSEMBLE_OUTPUTS if tensor.name not in hidden)


def _outputs(declared: Iterable[Tensor], one_sample: bool) -> tuple[Tensor, ...]:
    """Of one response: with one sample, as in a stream and always from TensorRT-LLM's core, or with all of them."""
    if one_sample:
        return tuple(declared)
    return tuple(
        dataclasses.replace(tensor, dims=(-1,)) if tensor.name in tensors.MANY_PER_PROMPT else tensor
        for tensor in declared
    )


def _add_step(config: pb.ModelConfig, model: str) -> Any:
    return config.ensemble_scheduling.step.add(model_name=model, model_version=-1)


def _declare(config: pb.ModelConfig, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> None:
    for target, declared, optional in ((config.input, inputs, True), (config.output, outputs, False)):
        for tensor in declared:
            entry = target.add(name=tensor.name, data_type=_data_type(tensor.dtype), dims=tensor.dims)
            if tensor.scalar and config.platform != "ensemble":
                entry.reshape.SetInParent()
            if optional:
                entry.optional = not tensor.required
                entry.allow_ragged_batch = tensor.ragged


def _data_type(name: str) -> int:
    return int(pb.DataType.Value(f"TYPE_{name}"))
