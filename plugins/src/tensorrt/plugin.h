// SPDX-License-Identifier: Apache-2.0
// Track fusion as a layer of a TensorRT network.
//
//   inputs   x [..., hidden]; residual like x, if has_residual; gamma [hidden] or [num_gammas, hidden], if has_norm
//   outputs  h like x; the norms [..., hidden] or [num_gammas, ..., hidden], if has_norm
//
// A builder times layers on one rank. In that phase nothing waits for a peer: h is a copy of x, the norms are copies of
// it as well. There is one format per type, no tactic, and no entry in the timing cache: all ranks run the same.
#pragma once

#include <memory>

#include "pt/cuda_fusion.h"
#include "tensorrt/fields.h"

namespace pt::tensorrt {

constexpr const char* kPluginName = "PtTrackFusion";
constexpr const char* kPluginVersion = "1";
constexpr const char* kPluginNamespace = "pt";

class TrackFusionPlugin : public nvinfer1::IPluginV3,
                          public nvinfer1::IPluginV3OneCore,
                          public nvinfer1::IPluginV3OneBuild,
                          public nvinfer1::IPluginV3OneRuntime {
 public:
  TrackFusionPlugin(Fields fields, nvinfer1::TensorRTPhase phase)
      : fields_(std::move(fields)), serialized_(fields_), phase_(phase) {}

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  const char* getPluginName() const noexcept override { return kPluginName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t num_inputs,
                          const nvinfer1::DynamicPluginTensorDesc* out, int32_t num_outputs) noexcept override;
  int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t num_outputs,
                             const nvinfer1::DataType* input_types, int32_t num_inputs) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t num_inputs,
                          const nvinfer1::DimsExprs* shape_inputs, int32_t num_shape_inputs,
                          nvinfer1::DimsExprs* outputs, int32_t num_outputs,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t num_inputs,
                                 int32_t num_outputs) noexcept override;
  int32_t getNbOutputs() const noexcept override { return 1 + fields_.has_norm; }

  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t num_inputs, const nvinfer1::PluginTensorDesc* out,
                        int32_t num_outputs) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override { return serialized_.collection(); }

 private:
  int32_t num_inputs() const { return 1 + fields_.has_residual + fields_.has_norm; }
  int32_t gamma_input() const { return 1 + fields_.has_residual; }
  pt_cuda_fusion_arguments arguments_of(const nvinfer1::PluginTensorDesc* in) const;

  Fields fields_;
  SerializedFields serialized_;
  nvinfer1::TensorRTPhase phase_;
  pt_cuda_fusion* channel_ = nullptr;
};

}  // namespace pt::tensorrt
