// SPDX-License-Identifier: Apache-2.0
// A protocol as a kernel.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda_fusion/call.h"
#include "cuda_fusion/device_memory.cuh"
#include "pt/cuda_fusion.h"

namespace pt::cuda_fusion {

using FuseKernel = void (*)(Channel, Call);

// One-shot, pull or two-shot with a codec other than PT_CODEC_NONE.
FuseKernel coded_kernel(int codec, int dtype, Algorithm algorithm);
// Compiled to a trap for targets before sm_90.
FuseKernel nvls_kernel(int dtype);

namespace {

template <typename Protocol>
__global__ void __launch_bounds__(kMaxBlockThreads, 1)
    fuse_kernel(const __grid_constant__ Channel channel, const __grid_constant__ Call call) {
  DeviceTeam team(blockIdx.x, gridDim.x);
  Protocol::run(channel, call, team);
}

// visit(Type{}) for a checked pt_dtype.
template <typename Visit>
auto with_type(int dtype, Visit&& visit) {
  switch (dtype) {
    case PT_BFLOAT16:
      return visit(numeric::Bfloat16{});
    case PT_FLOAT16:
      return visit(numeric::Float16{});
    default:
      return visit(numeric::Float32{});
  }
}

}  // namespace
}  // namespace pt::cuda_fusion
