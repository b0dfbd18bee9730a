// SPDX-License-Identifier: Apache-2.0
// The fingerprint of one step of a collective. Ranks compare them, so that a divergent call is an error and not a hang.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "pt/track_fusion.h"

namespace pt::track_fusion {

enum class Operation : uint8_t { kNone, kFuse, kAllReduce, kBroadcast, kGather, kBarrier, kPoll };

// 24 bytes: two of them share a cache line with the epoch flag.
struct CallRecord {
  Operation operation = Operation::kNone;
  uint8_t dtype = 0;
  uint8_t reduction = 0;
  uint8_t root = 0;
  uint8_t has_residual = 0;
  uint8_t codec = 0;  // PT_CODEC_NONE
  uint8_t algorithm = 0;
  uint8_t delta = 0;
  uint64_t rows = 0;
  uint64_t columns = 0;  // elements for fuse and all_reduce, bytes for broadcast and gather

  bool operator==(const CallRecord&) const = default;
};
static_assert(sizeof(CallRecord) == 24);

const char* operation_name(Operation operation);
const char* dtype_name(int dtype);
size_t dtype_bytes(int dtype);

// For example "fuse(mean, bfloat16 [4, 64])" or "broadcast(16 bytes, root 0)".
std::string describe(const CallRecord& record);

}  // namespace pt::track_fusion
