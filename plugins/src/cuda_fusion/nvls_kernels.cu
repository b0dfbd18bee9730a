// SPDX-License-Identifier: Apache-2.0
// The protocol over multicast memory as kernels, for any number of ranks. To be compiled for each target from PTX of
// its own: older PTX has no multimem.
#include "cuda_fusion/device_multimem.cuh"
#include "cuda_fusion/fuse_kernel.cuh"
#include "cuda_fusion/launch.h"
#include "cuda_fusion/nvls.h"

namespace pt::cuda_fusion {
namespace {

__global__ void multicast_probe_kernel(const __grid_constant__ Channel channel) {
  DeviceMultimem::store(channel, 1 + channel.rank, DeviceMultimem::sum<numeric::Float32>(channel, 0));
}

}  // namespace

FuseKernel nvls_kernel(int dtype) {
  return with_type(
      dtype, [](auto type) -> FuseKernel { return fuse_kernel<Nvls<DeviceMemory, DeviceMultimem, decltype(type)>>; });
}

cudaError_t nvls_target(int* target) {
  cudaFuncAttributes attributes = {};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, nvls_kernel(PT_BFLOAT16));
  *target = attributes.ptxVersion;
  return error;
}

cudaError_t launch_multicast_probe(const Channel& channel, cudaStream_t stream) {
  multicast_probe_kernel<<<1, 1, 0, stream>>>(channel);
  return cudaGetLastError();
}

}  // namespace pt::cuda_fusion
