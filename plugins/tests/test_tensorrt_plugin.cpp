// SPDX-License-Identifier: Apache-2.0
// The TensorRT layer through TensorRT's own interfaces, with one rank on host memory in place of a GPU.
#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "check.h"
#include "tensorrt/plugin.h"

using namespace pt::tensorrt;
using nvinfer1::DataType;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorRTPhase;

namespace {

int gather_alone(void*, const void* send, void* receive, size_t bytes) {
  std::memcpy(receive, send, bytes);
  return 0;
}

PluginTensorDesc desc(DataType type, std::initializer_list<int> dims) {
  PluginTensorDesc tensor = {};
  tensor.type = type;
  tensor.format = nvinfer1::TensorFormat::kLINEAR;
  for (const int extent : dims) tensor.dims.d[tensor.dims.nbDims++] = extent;
  return tensor;
}

template <typename Capability>
Capability* capability(nvinfer1::IPluginV3* plugin, nvinfer1::PluginCapabilityType type) {
  return static_cast<Capability*>(plugin->getCapabilityInterface(type));
}

}  // namespace

int main(int, char** argv) {
  void* library = ::dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) std::fprintf(stderr, "%s\n", ::dlerror());
  CHECK(library != nullptr);
  const auto get_creators =
      reinterpret_cast<nvinfer1::IPluginCreatorInterface* const* (*)(int32_t&)>(::dlsym(library, "getCreators"));
  CHECK(get_creators != nullptr && ::dlsym(library, "setLoggerFinder") != nullptr);
  int32_t count = 0;
  auto* creator = static_cast<nvinfer1::IPluginCreatorV3One*>(get_creators(count)[0]);
  CHECK(count == 1 && std::strcmp(creator->getPluginName(), "PtTrackFusion") == 0);

  Fields fields;
  fields.channel = "pt";
  fields.num_ranks = 1;
  fields.has_norm = 1;
  fields.eps = 0;
  const SerializedFields serialized(fields);
  using Plugin = std::unique_ptr<nvinfer1::IPluginV3>;
  const Plugin made(creator->createPlugin("layer", serialized.collection(), TensorRTPhase::kRUNTIME));
  CHECK(made != nullptr);
  auto* build = capability<nvinfer1::IPluginV3OneBuild>(made.get(), nvinfer1::PluginCapabilityType::kBUILD);
  auto* runtime = capability<nvinfer1::IPluginV3OneRuntime>(made.get(), nvinfer1::PluginCapabilityType::kRUNTIME);
  CHECK(build->getNbOutputs() == 2 && build->getNbTactics() == 0 && build->getTimingCacheID() == nullptr);
  const nvinfer1::PluginFieldCollection* written = runtime->getFieldsToSerialize();
  const Plugin again(creator->createPlugin("layer", written, TensorRTPhase::kRUNTIME));
  CHECK(again != nullptr);

  std::vector<std::string> names;
  for (int32_t i = 0; i < creator->getFieldNames()->nbFields; ++i) {
    names.push_back(creator->getFieldNames()->fields[i].name);
  }
  CHECK(std::find(names.begin(), names.end(), "codec") != names.end());
  nvinfer1::PluginFieldCollection older = *written;  // of engines from before there were codecs
  CHECK(std::strcmp(older.fields[--older.nbFields].name, "codec") == 0);
  CHECK(Fields::parse(older).codec == PT_CODEC_NONE);

  fields.codec = 5;
  CHECK(creator->createPlugin("layer", serialized.collection(), TensorRTPhase::kRUNTIME) == nullptr);
  try {
    Fields::parse(*serialized.collection());
    CHECK(false);
  } catch (const std::runtime_error& error) {
    CHECK_CONTAINS(error.what(), "codec is 5, expected 0 (none), 1 (int8)");
  }
  fields.codec = PT_CODEC_INT4;
  const Plugin coded(creator->createPlugin("layer", serialized.collection(), TensorRTPhase::kRUNTIME));
  CHECK(coded != nullptr);

  fields.version = 7;
  CHECK(creator->createPlugin("layer", serialized.collection(), TensorRTPhase::kRUNTIME) == nullptr);

  CHECK(runtime->attachToContext(nullptr) == nullptr);  // no channel of that name yet
  pt_cuda_fusion_config config = {};
  config.struct_bytes = sizeof(config);
  config.size = 1;
  config.provider = PT_FUSION_HOST_THREADS;
  pt_cuda_fusion* channel = nullptr;
  CHECK(pt_cuda_fusion_open(&config, gather_alone, nullptr, &channel) == PT_OK);
  CHECK(pt_cuda_fusion_register("pt", channel) == PT_OK);
  const Plugin attached(runtime->attachToContext(nullptr));
  CHECK(attached != nullptr);
  auto* running = capability<nvinfer1::IPluginV3OneRuntime>(attached.get(), nvinfer1::PluginCapabilityType::kRUNTIME);

  constexpr int kTokens = 3, kHidden = 16;
  std::vector<float> x(kTokens * kHidden, 4.0f), gamma(2 * kHidden, 0.5f), h(x.size()), norm(2 * x.size());
  const PluginTensorDesc in[] = {desc(DataType::kFLOAT, {kTokens, kHidden}), desc(DataType::kFLOAT, {2, kHidden})};
  const PluginTensorDesc out[] = {in[0], desc(DataType::kFLOAT, {2, kTokens, kHidden})};
  const void* inputs[] = {x.data(), gamma.data()};
  void* outputs[] = {h.data(), norm.data()};
  CHECK(running->onShapeChange(in, 2, out, 2) == 0);
  CHECK(running->enqueue(in, out, inputs, outputs, nullptr, nullptr) == 0);
  for (const float value : h) CHECK(value == 4.0f);
  for (const float value : norm) CHECK(value == 0.5f);

  // The largest value 7 makes the scale of int4 a 1: what is sent of 2.375 is 2.
  auto* maker = capability<nvinfer1::IPluginV3OneRuntime>(coded.get(), nvinfer1::PluginCapabilityType::kRUNTIME);
  const Plugin coding(maker->attachToContext(nullptr));
  CHECK(coding != nullptr);
  auto* sender = capability<nvinfer1::IPluginV3OneRuntime>(coding.get(), nvinfer1::PluginCapabilityType::kRUNTIME);
  for (size_t i = 0; i < x.size(); ++i) x[i] = i % 2 == 0 ? 7.0f : 2.375f;
  CHECK(sender->enqueue(in, out, inputs, outputs, nullptr, nullptr) == 0);
  for (size_t i = 0; i < h.size(); ++i) CHECK(h[i] == (i % 2 == 0 ? 7.0f : 2.0f));
  CHECK(running->enqueue(in, out, inputs, outputs, nullptr, nullptr) == 0);
  CHECK(h == x);

  CHECK(running->onShapeChange(in, 1, out, 2) != 0);
  const PluginTensorDesc wrong[] = {in[0], desc(DataType::kFLOAT, {2, kHidden + 1})};
  CHECK(running->enqueue(wrong, out, inputs, outputs, nullptr, nullptr) != 0);
  CHECK(pt_cuda_fusion_register("pt", nullptr) == PT_OK && pt_cuda_fusion_close(channel) == PT_OK);
}
