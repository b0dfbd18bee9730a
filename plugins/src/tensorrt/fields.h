// SPDX-License-Identifier: Apache-2.0
// What an engine remembers of a fusion layer: logical facts only. Not the rank, not the device, no pointers: the
// engines of different ranks differ in their weights alone.
#pragma once

#include <NvInferRuntime.h>

#include <string>
#include <vector>

#include "pt/codecs.h"

namespace pt::tensorrt {

constexpr int32_t kFieldsVersion = 1;

struct Fields {
  int32_t version = kFieldsVersion;
  std::string channel;  // name under which the application registers the rank's channel
  int32_t num_ranks = 0;
  int32_t reduction = 0;  // pt_reduction
  int32_t has_residual = 0;
  int32_t has_norm = 0;
  float eps = 1e-5f;
  int32_t codec = PT_CODEC_NONE;  // pt_codec; engines from before there was one have none

  // Throws std::runtime_error with what was found and what was expected.
  static Fields parse(const nvinfer1::PluginFieldCollection& collection);
};

// Fields in TensorRT's form; points into `fields`, which must outlive it.
class SerializedFields {
 public:
  explicit SerializedFields(const Fields& fields);
  SerializedFields(const SerializedFields&) = delete;
  SerializedFields& operator=(const SerializedFields&) = delete;
  const nvinfer1::PluginFieldCollection* collection() const { return &collection_; }

 private:
  std::vector<nvinfer1::PluginField> entries_;
  nvinfer1::PluginFieldCollection collection_;
};

}  // namespace pt::tensorrt
