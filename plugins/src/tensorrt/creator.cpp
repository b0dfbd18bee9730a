// SPDX-License-Identifier: Apache-2.0
// The creator, and what TensorRT's plugin registry looks for in a library.
#include <atomic>
#include <cstdio>

#include "tensorrt/log.h"
#include "tensorrt/plugin.h"

namespace pt::tensorrt {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

class TrackFusionCreator : public nvinfer1::IPluginCreatorV3One {
 public:
  nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override {
    return logged<nvinfer1::IPluginV3*>(nullptr, [&]() -> nvinfer1::IPluginV3* {
      if (fields == nullptr) throw std::runtime_error("PtTrackFusion: there are no fields");
      return new TrackFusionPlugin(Fields::parse(*fields), phase);
    });
  }
  // Names and types; the values are those of a default-made Fields.
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return names_.collection(); }
  const char* getPluginName() const noexcept override { return kPluginName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

 private:
  Fields defaults_;
  SerializedFields names_{defaults_};
};

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept { logger_finder = finder; }

void log_error(const char* text) noexcept {
  nvinfer1::ILoggerFinder* const finder = logger_finder;
  nvinfer1::ILogger* const logger = finder == nullptr ? nullptr : finder->findLogger();
  if (logger != nullptr) {
    logger->log(nvinfer1::ILogger::Severity::kERROR, text);
  } else {
    std::fprintf(stderr, "%s\n", text);
  }
}

}  // namespace pt::tensorrt

extern "C" {

PT_API void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { pt::tensorrt::set_logger_finder(finder); }

PT_API nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static pt::tensorrt::TrackFusionCreator creator;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
  count = 1;
  return creators;
}

}  // extern "C"
