// SPDX-License-Identifier: Apache-2.0
// Where host code meets kernels. Asynchronous, ordered by the stream, fit for capture into a graph.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda_fusion/plan.h"

namespace pt::cuda_fusion {

// All but NCCL, on `num_blocks` blocks.
cudaError_t launch_protocol(const Channel& channel, const Plan& plan, int dtype, uint32_t num_blocks,
                            cudaStream_t stream);
// What the NVLS kernels on this device were compiled for, as 90 for sm_90: they need that or newer.
cudaError_t nvls_target(int* target);
// Stores the sum over ranks of vector 0 of the multicast memory as vector 1 + rank.
cudaError_t launch_multicast_probe(const Channel& channel, cudaStream_t stream);
// Blocks of the largest kernel that fit on one multiprocessor.
cudaError_t resident_blocks(int* blocks);

// inboxes[i] = sentinel
cudaError_t launch_fill(Vector* inboxes, uint64_t count, cudaStream_t stream);
// Tells all ranks that `channel.rank` gives up.
cudaError_t launch_abort(const Channel& channel, cudaStream_t stream);

// Writes a word that says who it came from to every rank.
cudaError_t launch_probe(const Channel& channel, cudaStream_t stream);

// out[i] = round(scale * sum over ranks of sources[rank][i]); whole vectors.
struct SliceSum {
  const void* sources[kMaxRanks];
  uint32_t size;
  void* out;
  uint64_t count;
  float scale;
};
cudaError_t launch_slice_sum(const SliceSum& sum, int dtype, cudaStream_t stream);
// Norms of rows of h that are complete.
cudaError_t launch_norm(const Plan& plan, int dtype, cudaStream_t stream);

}  // namespace pt::cuda_fusion
