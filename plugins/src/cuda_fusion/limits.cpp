// SPDX-License-Identifier: Apache-2.0
#include "cuda_fusion/limits.h"

#include <algorithm>

namespace pt::cuda_fusion {

const char* algorithm_name(Algorithm algorithm) noexcept {
  switch (algorithm) {
    case Algorithm::kOneShot:
      return "one-shot";
    case Algorithm::kPull:
      return "pull";
    case Algorithm::kTwoShot:
      return "two-shot";
    case Algorithm::kNccl:
      return "nccl";
    case Algorithm::kNvls:
      return "nvls";
  }
  return "unknown";
}

Algorithm select_algorithm(const Selection& s, const Limits& limits) noexcept {
  if (s.bytes <= std::min(limits.one_shot, s.one_shot_room)) return Algorithm::kOneShot;
  if (s.is_coded) {
    // A rank sends n - 1 messages by pull, 2 (n - 1) / n of one by two-shot: with two ranks the same, and encoded
    // twice.
    return s.size > 2 && s.bytes > limits.pull && !s.encodes_once ? Algorithm::kTwoShot : Algorithm::kPull;
  }
  // Only the pull form adds the residual before the one rounding.
  if (s.bytes <= limits.pull || s.has_residual) return Algorithm::kPull;
  if (s.bytes <= limits.two_shot || !s.has_nccl) return Algorithm::kTwoShot;
  return Algorithm::kNccl;
}

}  // namespace pt::cuda_fusion
