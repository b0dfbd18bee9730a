// SPDX-License-Identifier: Apache-2.0
// The protocols as kernels, without codecs; and what else runs on the device.
#include <vector>

#include "cuda_fusion/fuse_kernel.cuh"
#include "cuda_fusion/launch.h"
#include "cuda_fusion/one_shot.h"
#include "cuda_fusion/pull.h"
#include "cuda_fusion/two_shot.h"

namespace pt::cuda_fusion {
namespace {

constexpr uint32_t kFlatThreads = 256;

template <typename Type>
__global__ void __launch_bounds__(kMaxBlockThreads, 1) norm_kernel(const __grid_constant__ Call call) {
  DeviceTeam team(blockIdx.x, gridDim.x);
  for (uint64_t row = team.block(); row < call.rows; row += team.num_blocks()) {
    float squares = 0.0f;
    for (uint32_t c = team.thread(); c < call.vectors_in<Type>(row); c += team.size()) {
      squares = add(squares, store_h<Type>(call, row, c, load_vector<Type>(call, call.h, row, c)));
    }
    norm_row<Type>(call, team, row, squares);
  }
}

template <typename Type>
__global__ void __launch_bounds__(kFlatThreads) slice_sum_kernel(const __grid_constant__ SliceSum sum) {
  const uint64_t stride = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  const uint64_t vectors = sum.count / kPerVector<Type>;
  for (uint64_t i = blockIdx.x * static_cast<uint64_t>(blockDim.x) + threadIdx.x; i < vectors; i += stride) {
    float sums[kPerVector<Type>];
    start<Type>(sums, without_sentinel(static_cast<const Vector*>(sum.sources[0])[i]));
    for (uint32_t rank = 1; rank < sum.size; ++rank) {
      accumulate<Type>(sums, without_sentinel(static_cast<const Vector*>(sum.sources[rank])[i]));
    }
    for (int k = 0; k < kPerVector<Type>; ++k) sums[k] = multiply(sums[k], sum.scale);
    static_cast<Vector*>(sum.out)[i] = packed<Type>(sums);
  }
}

__global__ void fill_kernel(Vector* inboxes, uint64_t count) {
  const uint64_t stride = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  for (uint64_t i = blockIdx.x * static_cast<uint64_t>(blockDim.x) + threadIdx.x; i < count; i += stride) {
    inboxes[i] = filled(kSentinel);
  }
}

__global__ void abort_kernel(const __grid_constant__ Channel channel) {
  if (threadIdx.x < channel.size) {
    DeviceMemory::store_relaxed(&channel.header(threadIdx.x)->abort, channel.rank + 1);
  }
}

__global__ void probe_kernel(const __grid_constant__ Channel channel) {
  if (threadIdx.x < channel.size) {
    DeviceMemory::store_relaxed(&channel.header(threadIdx.x)->probe[channel.rank], kMagic + channel.rank);
  }
}

// Only eight ranks have kernels of their own, which read all packets at once: every kernel costs a second of compile
// time per target.
template <typename Type>
FuseKernel plain_kernel(Algorithm algorithm, uint32_t size) {
  using Memory = DeviceMemory;
  if (algorithm == Algorithm::kPull) return fuse_kernel<Pull<Memory, Plain<Type>>>;
  if (algorithm == Algorithm::kOneShot) {
    return size == 8 ? fuse_kernel<OneShot<Memory, Plain<Type>, 8>> : fuse_kernel<OneShot<Memory, Plain<Type>, 0>>;
  }
  return size == 8 ? fuse_kernel<TwoShot<Memory, Plain<Type>, 8>> : fuse_kernel<TwoShot<Memory, Plain<Type>, 0>>;
}

uint32_t blocks_for(uint64_t work, uint32_t limit) {
  return static_cast<uint32_t>(work < limit ? (work == 0 ? 1 : work) : limit);
}

}  // namespace

cudaError_t launch_protocol(const Channel& channel, const Plan& plan, int dtype, uint32_t num_blocks,
                            cudaStream_t stream) {
  const auto plain = [&](auto type) { return plain_kernel<decltype(type)>(plan.algorithm, channel.size); };
  const FuseKernel kernel = plan.algorithm == Algorithm::kNvls ? nvls_kernel(dtype)
                            : plan.codec == PT_CODEC_NONE      ? with_type(dtype, plain)
                                                               : coded_kernel(plan.codec, dtype, plan.algorithm);
  kernel<<<num_blocks, plan.threads, 0, stream>>>(channel, plan.call);
  return cudaGetLastError();
}

cudaError_t resident_blocks(int* blocks) {
  using numeric::Bfloat16;
  std::vector<FuseKernel> kernels = {plain_kernel<Bfloat16>(Algorithm::kPull, 0),
                                     plain_kernel<Bfloat16>(Algorithm::kTwoShot, 0),
                                     plain_kernel<Bfloat16>(Algorithm::kTwoShot, 8), nvls_kernel(PT_BFLOAT16)};
  for (int codec = PT_CODEC_INT8; codec <= PT_CODEC_MXFP4; ++codec) {
    kernels.push_back(coded_kernel(codec, PT_BFLOAT16, Algorithm::kPull));
    kernels.push_back(coded_kernel(codec, PT_BFLOAT16, Algorithm::kTwoShot));
  }
  *blocks = 1 << 20;
  for (const FuseKernel kernel : kernels) {
    int found = 0;
    const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found, kernel, kMaxBlockThreads, 0);
    if (error != cudaSuccess) return error;
    if (found < *blocks) *blocks = found;
  }
  return cudaSuccess;
}

cudaError_t launch_fill(Vector* inboxes, uint64_t count, cudaStream_t stream) {
  fill_kernel<<<blocks_for(count / kFlatThreads + 1, 1024), kFlatThreads, 0, stream>>>(inboxes, count);
  return cudaGetLastError();
}

cudaError_t launch_abort(const Channel& channel, cudaStream_t stream) {
  abort_kernel<<<1, 32, 0, stream>>>(channel);
  return cudaGetLastError();
}

cudaError_t launch_probe(const Channel& channel, cudaStream_t stream) {
  probe_kernel<<<1, 32, 0, stream>>>(channel);
  return cudaGetLastError();
}

cudaError_t launch_slice_sum(const SliceSum& sum, int dtype, cudaStream_t stream) {
  return with_type(dtype, [&](auto type) {
    using Type = decltype(type);
    const uint64_t vectors = sum.count / kPerVector<Type>;
    slice_sum_kernel<Type><<<blocks_for(vectors / kFlatThreads + 1, 2048), kFlatThreads, 0, stream>>>(sum);
    return cudaGetLastError();
  });
}

cudaError_t launch_norm(const Plan& plan, int dtype, cudaStream_t stream) {
  return with_type(dtype, [&](auto type) {
    norm_kernel<decltype(type)><<<blocks_for(plan.call.rows, 4096), plan.threads, 0, stream>>>(plan.call);
    return cudaGetLastError();
  });
}

}  // namespace pt::cuda_fusion
