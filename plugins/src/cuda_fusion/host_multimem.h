// SPDX-License-Identifier: Apache-2.0
// The switch as host threads see it: sums in rank order in float32, rounded once; stores to all. The accesses are
// plain, so that ThreadSanitizer checks that the flags order them.
#pragma once

#include "cuda_fusion/row.h"

namespace pt::cuda_fusion {

// What Channel::multicast points to on the host.
struct HostReplicas {
  Vector* of[kMaxRanks];
};

struct HostMultimem {
  template <typename Type>
  static Vector sum(const Channel& channel, uint64_t at) {
    float sums[kPerVector<Type>];
    start<Type>(sums, replica(channel, 0)[at]);
    for (uint32_t rank = 1; rank < channel.size; ++rank) accumulate<Type>(sums, replica(channel, rank)[at]);
    return packed<Type>(sums);
  }
  static void store(const Channel& channel, uint64_t at, const Vector& v) {
    for (uint32_t rank = 0; rank < channel.size; ++rank) replica(channel, rank)[at] = v;
  }
  static void fence() {}  // all use the same addresses

 private:
  static Vector* replica(const Channel& channel, uint32_t rank) {
    return static_cast<const HostReplicas*>(channel.multicast)->of[rank];
  }
};

}  // namespace pt::cuda_fusion
