// SPDX-License-Identifier: Apache-2.0
// The few calls of NCCL that are needed, looked up at run time: libnccl.so.2 is optional.
#pragma once

#include "cuda_fusion/exchange.h"
#include "cuda_fusion/launch.h"

namespace pt::cuda_fusion {

// Whether this rank could use NCCL.
bool nccl_found() noexcept;

// Large messages: slices travel to their owners, the owner adds them in rank order in float32 and rounds once, and the
// sums travel to everybody. The bytes of NCCL's all-reduce, but not its order and precision of additions, which depend
// on its version and the topology.
class Nccl {
 public:
  // Collective. `scratch_bytes`: of device memory, longer messages go in pieces.
  Nccl(int rank, int size, uint64_t scratch_bytes, const Exchange& exchange);
  Nccl(const Nccl&) = delete;
  Nccl& operator=(const Nccl&) = delete;
  ~Nccl();

  void launch(const Plan& plan, int dtype, cudaStream_t stream) const;

 private:
  void exchange_slices(const Call& call, int dtype, uint64_t first, uint64_t count, cudaStream_t stream) const;

  int rank_;
  int size_;
  uint64_t scratch_bytes_;
  void* communicator_ = nullptr;
  unsigned char* scratch_ = nullptr;
};

}  // namespace pt::cuda_fusion
