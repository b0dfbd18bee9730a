// SPDX-License-Identifier: Apache-2.0
// From a caller's tensors to an algorithm and a message cut into rows and pieces.
#pragma once

#include "cuda_fusion/call.h"
#include "pt/cuda_fusion.h"

namespace pt::cuda_fusion {

struct Plan {
  Algorithm algorithm;
  int codec;  // pt_codec
  Call call;
  // Threads of a block: of the row's length only, so that every algorithm adds the squares of a row alike.
  uint32_t threads;
};

size_t dtype_bytes(int dtype) noexcept;

// Checks the arguments, throws pt::Error. `has_nccl`, `has_nvls`: on every rank. The algorithm is the one asked
// for in `arguments`, or chosen.
Plan make_plan(const pt_cuda_fusion_arguments& arguments, const Layout& layout, const Limits& limits, bool has_nccl,
               bool has_nvls = false);

}  // namespace pt::cuda_fusion
