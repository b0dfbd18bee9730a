// SPDX-License-Identifier: Apache-2.0
// Errors of the CUDA runtime and driver as exceptions; handles that close themselves.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <memory>

#include "cuda_fusion/error.h"

namespace pt::cuda_fusion {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw Error(PT_SYSTEM_ERROR,
              format_text("cuda_fusion: %s: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error)));
}

// Makes a device current for a scope.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check_cuda(cudaSetDevice(device), "cudaSetDevice");
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  ~DeviceScope() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
};

struct FreeDevice {
  void operator()(void* memory) const { cudaFree(memory); }
};
template <typename Object>
using DevicePointer = std::unique_ptr<Object, FreeDevice>;

template <typename Object>
DevicePointer<Object> device_allocate(size_t bytes, const char* what) {
  void* memory = nullptr;
  const cudaError_t error = cudaMalloc(&memory, bytes);
  if (error != cudaSuccess) {
    throw Error(PT_SYSTEM_ERROR,
                format_text("cuda_fusion: cudaMalloc of %zu bytes for %s: %s", bytes, what, cudaGetErrorString(error)));
  }
  return DevicePointer<Object>(static_cast<Object*>(memory));
}

}  // namespace pt::cuda_fusion

#define PT_CUDA(call) ::pt::cuda_fusion::check_cuda((call), #call)
