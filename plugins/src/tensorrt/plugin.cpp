// SPDX-License-Identifier: Apache-2.0
#include "tensorrt/plugin.h"

#include <cuda_runtime_api.h>

#include <stdexcept>

#include "tensorrt/log.h"

namespace pt::tensorrt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginTensorDesc;

[[noreturn]] void fail(const std::string& text) { throw std::runtime_error("PtTrackFusion: " + text); }

bool is_supported(DataType type) {
  return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

int dtype_of(DataType type) {
  if (type == DataType::kFLOAT) return PT_FLOAT32;
  if (type == DataType::kBF16) return PT_BFLOAT16;
  if (type == DataType::kHALF) return PT_FLOAT16;
  fail("a tensor has type " + std::to_string(static_cast<int>(type)) + ", expected float32, float16 or bfloat16");
}

uint64_t product(const Dims& dims, int32_t count) {
  uint64_t result = 1;
  for (int32_t i = 0; i < count; ++i) result *= static_cast<uint64_t>(dims.d[i]);
  return result;
}

}  // namespace

nvinfer1::IPluginCapability* TrackFusionPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* TrackFusionPlugin::clone() noexcept {
  return logged<nvinfer1::IPluginV3*>(nullptr, [&] {
    auto copy = std::make_unique<TrackFusionPlugin>(fields_, phase_);
    copy->channel_ = channel_;
    return copy.release();
  });
}

int32_t TrackFusionPlugin::configurePlugin(const nvinfer1::DynamicPluginTensorDesc*, int32_t num_inputs,
                                           const nvinfer1::DynamicPluginTensorDesc*, int32_t num_outputs) noexcept {
  return logged<int32_t>(-1, [&] {
    if (num_inputs != this->num_inputs() || num_outputs != getNbOutputs()) {
      fail(std::to_string(num_inputs) + " inputs and " + std::to_string(num_outputs) + " outputs, expected " +
           std::to_string(this->num_inputs()) + " and " + std::to_string(getNbOutputs()));
    }
    return 0;
  });
}

int32_t TrackFusionPlugin::getOutputDataTypes(DataType* output_types, int32_t num_outputs, const DataType* input_types,
                                              int32_t num_inputs) const noexcept {
  if (num_inputs < 1) return -1;
  for (int32_t i = 0; i < num_outputs; ++i) output_types[i] = input_types[0];
  return 0;
}

int32_t TrackFusionPlugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t num_inputs,
                                           const nvinfer1::DimsExprs*, int32_t, nvinfer1::DimsExprs* outputs, int32_t,
                                           nvinfer1::IExprBuilder&) noexcept {
  return logged<int32_t>(-1, [&] {
    if (num_inputs != this->num_inputs()) fail(std::to_string(num_inputs) + " inputs");
    const nvinfer1::DimsExprs& x = inputs[0];
    outputs[0] = x;
    if (fields_.has_norm == 0) return 0;
    const nvinfer1::DimsExprs& gamma = inputs[gamma_input()];
    if (gamma.nbDims == 1) {
      outputs[1] = x;
      return 0;
    }
    if (gamma.nbDims != 2 || x.nbDims + 1 > Dims::MAX_DIMS) {
      fail("gamma has " + std::to_string(gamma.nbDims) + " dimensions, expected 1 or 2");
    }
    outputs[1].nbDims = x.nbDims + 1;
    outputs[1].d[0] = gamma.d[0];
    for (int32_t i = 0; i < x.nbDims; ++i) outputs[1].d[i + 1] = x.d[i];
    return 0;
  });
}

bool TrackFusionPlugin::supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                                  int32_t, int32_t) noexcept {
  const PluginTensorDesc& tensor = tensors[position].desc;
  const DataType x = tensors[0].desc.type;
  if (tensor.format != nvinfer1::TensorFormat::kLINEAR || !is_supported(tensor.type)) return false;
  if (fields_.has_norm != 0 && position == gamma_input()) return tensor.type == x || tensor.type == DataType::kFLOAT;
  return tensor.type == x;
}

pt_cuda_fusion_arguments TrackFusionPlugin::arguments_of(const PluginTensorDesc* in) const {
  const Dims& x = in[0].dims;
  if (x.nbDims < 1) fail("x is a scalar, expected [..., hidden]");
  pt_cuda_fusion_arguments arguments = {};
  arguments.struct_bytes = sizeof(arguments);
  arguments.dtype = dtype_of(in[0].type);
  arguments.reduction = fields_.reduction;
  arguments.algorithm = PT_FUSION_AUTO;
  arguments.hidden = static_cast<uint64_t>(x.d[x.nbDims - 1]);
  arguments.tokens = product(x, x.nbDims - 1);
  arguments.eps = fields_.eps;
  arguments.codec = fields_.codec;
  arguments.gamma_dtype = arguments.dtype;
  if (fields_.has_norm != 0) {
    const PluginTensorDesc& gamma = in[gamma_input()];
    const int32_t last = gamma.dims.nbDims - 1;
    if (last < 0 || last > 1 || static_cast<uint64_t>(gamma.dims.d[last]) != arguments.hidden) {
      fail("gamma does not end in " + std::to_string(arguments.hidden) + " elements like x");
    }
    arguments.num_gammas = static_cast<uint32_t>(product(gamma.dims, last));
    arguments.gamma_dtype = dtype_of(gamma.type);
  }
  return arguments;
}

int32_t TrackFusionPlugin::onShapeChange(const PluginTensorDesc* in, int32_t num_inputs, const PluginTensorDesc*,
                                         int32_t) noexcept {
  return logged<int32_t>(-1, [&] {
    if (num_inputs != this->num_inputs()) fail(std::to_string(num_inputs) + " inputs");
    arguments_of(in);
    return 0;
  });
}

int32_t TrackFusionPlugin::enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs,
                                   void* const* outputs, void*, cudaStream_t stream) noexcept {
  return logged<int32_t>(-1, [&] {
    pt_cuda_fusion_arguments arguments = arguments_of(in);
    arguments.x = inputs[0];
    arguments.residual = fields_.has_residual != 0 ? inputs[1] : nullptr;
    arguments.h = outputs[0];
    arguments.gamma = fields_.has_norm != 0 ? inputs[gamma_input()] : nullptr;
    arguments.norm_out = fields_.has_norm != 0 ? outputs[1] : nullptr;
    if (phase_ == nvinfer1::TensorRTPhase::kBUILD) {
      const size_t bytes = arguments.tokens * arguments.hidden * (arguments.dtype == PT_FLOAT32 ? 4 : 2);
      for (uint32_t copy = 0; copy < 1 + arguments.num_gammas; ++copy) {
        void* const to = copy == 0 ? arguments.h : static_cast<char*>(arguments.norm_out) + (copy - 1) * bytes;
        const cudaError_t error = cudaMemcpyAsync(to, arguments.x, bytes, cudaMemcpyDeviceToDevice, stream);
        if (error != cudaSuccess) fail(std::string("cudaMemcpyAsync: ") + cudaGetErrorString(error));
      }
      return 0;
    }
    if (channel_ == nullptr) fail("enqueue before attachToContext: there is no channel");
    if (pt_cuda_fusion_fuse(channel_, &arguments, stream) != PT_OK) fail(pt_cuda_fusion_last_error());
    return 0;
  });
}

nvinfer1::IPluginV3* TrackFusionPlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
  return logged<nvinfer1::IPluginV3*>(nullptr, [&] {
    auto copy = std::make_unique<TrackFusionPlugin>(fields_, phase_);
    if (phase_ == nvinfer1::TensorRTPhase::kRUNTIME) {
      copy->channel_ = pt_cuda_fusion_find(fields_.channel.c_str());
      if (copy->channel_ == nullptr) {
        fail("this process has no channel '" + fields_.channel +
             "'; open one and pt_cuda_fusion_register it before the execution context is created");
      }
      const int size = pt_cuda_fusion_size(copy->channel_);
      if (size != fields_.num_ranks) {
        fail("channel '" + fields_.channel + "' has " + std::to_string(size) + " ranks, the engine was built for " +
             std::to_string(fields_.num_ranks));
      }
    }
    return copy.release();
  });
}

}  // namespace pt::tensorrt
