// SPDX-License-Identifier: Apache-2.0
// TensorRT's logger, as far as it has told us.
#pragma once

#include <NvInferRuntime.h>

#include <exception>

namespace pt::tensorrt {

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;
// To TensorRT's logger, or to stderr before there is one.
void log_error(const char* text) noexcept;

// Entry points must not throw: an exception would end the process. Runs `body`, logs what it throws.
template <typename Result, typename Body>
Result logged(Result on_failure, Body&& body) noexcept {
  try {
    return body();
  } catch (const std::exception& error) {
    log_error(error.what());
  } catch (...) {
    log_error("PtTrackFusion: unknown exception");
  }
  return on_failure;
}

}  // namespace pt::tensorrt
