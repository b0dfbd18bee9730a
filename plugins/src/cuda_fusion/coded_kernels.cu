// SPDX-License-Identifier: Apache-2.0
// The protocols with encoded payloads as kernels, for any number of ranks.
#include "cuda_fusion/device_coder.cuh"
#include "cuda_fusion/fuse_kernel.cuh"
#include "cuda_fusion/one_shot.h"
#include "cuda_fusion/pull.h"
#include "cuda_fusion/two_shot.h"

namespace pt::cuda_fusion {

FuseKernel coded_kernel(int codec, int dtype, Algorithm algorithm) {
  FuseKernel kernel = nullptr;
  codecs::with_codec(codec, [&](auto chosen) {
    kernel = with_type(dtype, [&](auto type) -> FuseKernel {
      using Payload = Coded<WarpCoder<decltype(chosen)>, decltype(type)>;
      if (algorithm == Algorithm::kPull) return fuse_kernel<Pull<DeviceMemory, Payload>>;
      if (algorithm == Algorithm::kTwoShot) return fuse_kernel<TwoShot<DeviceMemory, Payload, 0>>;
      return fuse_kernel<OneShot<DeviceMemory, Payload, 0>>;
    });
  });
  return kernel;
}

}  // namespace pt::cuda_fusion
