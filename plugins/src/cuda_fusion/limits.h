// SPDX-License-Identifier: Apache-2.0
// Which algorithm fuses a message. A function of what all ranks know alike, and of nothing else: never of timings, of
// the rank, or of what one rank's machine can do.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace pt::cuda_fusion {

constexpr int kMaxRanks = 16;

enum class Algorithm : uint32_t { kOneShot = 0, kPull = 1, kTwoShot = 2, kNccl = 3, kNvls = 4 };
constexpr int kNumAlgorithms = 5;

const char* algorithm_name(Algorithm algorithm) noexcept;

// Largest message of one rank, in bytes, for each algorithm; above all of them comes NCCL, or two-shot in pieces where
// NCCL is missing on some rank. Encoded messages have the same limits, in bytes as they travel: past `pull` it is the
// bytes on the links that take the time, with a codec or without. From public measurements on Hopper with NVSwitch,
// without codecs; to be tuned on the target.
struct Limits {
  size_t one_shot;
  size_t pull;
  size_t two_shot;

  static constexpr Limits defaults(int size) {
    if (size <= 2) return {size_t{512} << 10, size_t{32} << 20, size_t{32} << 20};
    if (size <= 4) return {size_t{512} << 10, size_t{1536} << 10, size_t{16} << 20};
    return {size_t{256} << 10, size_t{256} << 10, size_t{8} << 20};
  }
};

struct Selection {
  int size;
  size_t bytes;          // one rank's message as it travels: after the codec, rows padded to whole vectors
  size_t one_shot_room;  // of an inbox
  bool is_coded;
  bool encodes_once;  // two-shot would encode twice
  bool has_residual;  // two-shot would round twice, without a codec
  bool has_nccl;      // on every rank
};

// Never kNvls: its sums differ from call to call, so it has to be asked for.
Algorithm select_algorithm(const Selection& selection, const Limits& limits) noexcept;

}  // namespace pt::cuda_fusion
