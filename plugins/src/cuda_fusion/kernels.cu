// SPDX-License-Identifier: Apache-2.0
// The protocols as kernels.
#include "cuda_fusion/device_memory.cuh"
#include "cuda_fusion/launch.h"
#include "cuda_fusion/one_shot.h"
#include "cuda_fusion/pull.h"
#include "cuda_fusion/two_shot.h"

namespace pt::cuda_fusion {
namespace {

constexpr uint32_t kFlatThreads = 256;

template <typename Protocol>
__global__ void __launch_bounds__(kMaxBlockThreads, 1)
    fuse_kernel(const __grid_constant__ Channel channel, const __grid_constant__ Call call) {
  DeviceTeam team(blockIdx.x, gridDim.x);
  Protocol::run(channel, call, team);
}

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

// Calls visit(Type{}) for a checked pt_dtype.
template <typename Visit>
cudaError_t with_type(int dtype, Visit&& visit) {
  switch (dtype) {
    case PT_BFLOAT16:
      return visit(numeric::Bfloat16{});
    case PT_FLOAT16:
      return visit(numeric::Float16{});
    default:
      return visit(numeric::Float32{});
  }
}

using FuseKernel = void (*)(Channel, Call);

template <typename Protocol>
constexpr FuseKernel kKernel = fuse_kernel<Protocol>;

// Specialised for the numbers of ranks that use an algorithm; every kernel costs a second of compile time per target.
template <typename Type>
FuseKernel kernel_of(Algorithm algorithm, uint32_t size) {
  using Memory = DeviceMemory;
  switch (algorithm) {
    case Algorithm::kOneShot:
      if (size == 2) return kKernel<OneShot<Memory, Type, 2>>;
      if (size == 4) return kKernel<OneShot<Memory, Type, 4>>;
      if (size == 8) return kKernel<OneShot<Memory, Type, 8>>;
      return kKernel<OneShot<Memory, Type, 0>>;
    case Algorithm::kPull:
      if (size == 2) return kKernel<Pull<Memory, Type, 2>>;
      if (size == 4) return kKernel<Pull<Memory, Type, 4>>;
      return kKernel<Pull<Memory, Type, 0>>;
    default:
      if (size == 4) return kKernel<TwoShot<Memory, Type, 4>>;
      if (size == 8) return kKernel<TwoShot<Memory, Type, 8>>;
      return kKernel<TwoShot<Memory, Type, 0>>;
  }
}

uint32_t blocks_for(uint64_t work, uint32_t limit) {
  return static_cast<uint32_t>(work < limit ? (work == 0 ? 1 : work) : limit);
}

}  // namespace

cudaError_t launch_protocol(const Channel& channel, const Plan& plan, int dtype, uint32_t num_blocks,
                            cudaStream_t stream) {
  return with_type(dtype, [&](auto type) {
    const FuseKernel kernel = kernel_of<decltype(type)>(plan.algorithm, channel.size);
    kernel<<<num_blocks, plan.threads, 0, stream>>>(channel, plan.call);
    return cudaGetLastError();
  });
}

cudaError_t resident_blocks(int* blocks) {
  *blocks = 1 << 20;
  for (const Algorithm algorithm : {Algorithm::kPull, Algorithm::kTwoShot}) {
    for (const uint32_t size : {2, 4, 8, 3}) {
      int found = 0;
      const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
          &found, kernel_of<numeric::Bfloat16>(algorithm, size), kMaxBlockThreads, 0);
      if (error != cudaSuccess) return error;
      if (found < *blocks) *blocks = found;
    }
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
