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
  // The calling thread is this lane from here on.
  void enter(uint32_t lane) {
    current_ = this;
    lane_ = lane;
  }
  static uint32_t exchange(uint32_t value, uint32_t from) {
    WarpOfThreads& warp = *current_;
    warp.values_[lane_] = value;
    warp.block_.sync();
    const uint32_t result = warp.values_[from % kWarp];
    warp.block_.sync();
    return result;
  }
  static uint32_t lane() { return lane_; }

  // body(lane) on all lanes of a warp.
  template <typename Body>
  static void run(const Body& body) {
    WarpOfThreads warp;
    std::vector<std::thread> threads;
    for (uint32_t lane = 0; lane < kWarp; ++lane) {
      threads.emplace_back([&, lane] {
        warp.enter(lane);
        body(lane);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }

 private:
  static inline thread_local WarpOfThreads* current_ = nullptr;
  static inline thread_local uint32_t lane_ = 0;
  uint32_t values_[kWarp] = {};
  cuda_fusion::HostBlock block_{kWarp};
};

}  // namespace pt::testing

inline uint32_t __shfl_sync(uint32_t, uint32_t value, uint32_t from) {
  return pt::testing::WarpOfThreads::exchange(value, from);
}
inline uint32_t __shfl_xor_sync(uint32_t, uint32_t value, int distance) {
  return pt::testing::WarpOfThreads::exchange(value,
                                              pt::testing::WarpOfThreads::lane() ^ static_cast<uint32_t>(distance));
}
