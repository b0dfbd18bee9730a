// SPDX-License-Identifier: Apache-2.0
// The few words of CUDA that codes of a warp are made with, for 32 host threads as its lanes. Include it before the
// device's sources.
#pragma once

#include <algorithm>
#include <thread>
#include <vector>

#include "cuda_fusion/host_team.h"

#define __device__
#define __forceinline__ inline

struct uint2 {
  uint32_t x, y;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint32_t max(uint32_t a, uint32_t b) { return std::max(a, b); }

namespace pt::testing {

constexpr uint32_t kWarp = 32;

class WarpOfThreads {
 public:
  static uint32_t exchange(uint32_t value, uint32_t from) {
    values_[lane_] = value;
    block_.sync();
    const uint32_t result = values_[from % kWarp];
    block_.sync();
    return result;
  }
  static uint32_t lane() { return lane_; }

  // body(lane) on all lanes.
  template <typename Body>
  static void run(const Body& body) {
    std::vector<std::thread> threads;
    for (uint32_t lane = 0; lane < kWarp; ++lane) {
      threads.emplace_back([&, lane] {
        lane_ = lane;
        body(lane);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }

 private:
  static inline thread_local uint32_t lane_ = 0;
  static inline uint32_t values_[kWarp] = {};
  static inline cuda_fusion::HostBlock block_{kWarp};
};

}  // namespace pt::testing

inline uint32_t __shfl_sync(uint32_t, uint32_t value, uint32_t from) {
  return pt::testing::WarpOfThreads::exchange(value, from);
}
inline uint32_t __shfl_xor_sync(uint32_t, uint32_t value, int distance) {
  return pt::testing::WarpOfThreads::exchange(value,
                                              pt::testing::WarpOfThreads::lane() ^ static_cast<uint32_t>(distance));
}
