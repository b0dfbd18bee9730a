// SPDX-License-Identifier: Apache-2.0
// A block of host threads: each runs the protocol's source as a CUDA thread would.
#pragma once

#include <atomic>

#include "cuda_fusion/host_memory.h"

namespace pt::cuda_fusion {

// Shared by the threads of one block.
class HostBlock {
 public:
  explicit HostBlock(uint32_t size) : size_(size) {}

  uint32_t size() const { return size_; }
  // Returns when all threads have called it.
  void sync() {
    const uint32_t round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    while (round_.load(std::memory_order_acquire) == round) HostMemory::pause();
  }

  static constexpr uint32_t kMaxSize = 32;
  float partial[2][kMaxSize] = {};
  bool vote[2][kMaxSize] = {};

 private:
  uint32_t size_;
  std::atomic<uint32_t> arrived_{0};
  std::atomic<uint32_t> round_{0};
};

class HostTeam {
 public:
  HostTeam(HostBlock& shared, uint32_t thread, uint32_t block, uint32_t num_blocks)
      : shared_(shared), thread_(thread), block_(block), num_blocks_(num_blocks) {}

  uint32_t thread() const { return thread_; }
  uint32_t size() const { return shared_.size(); }
  uint32_t block() const { return block_; }
  uint32_t num_blocks() const { return num_blocks_; }
  void sync() const { shared_.sync(); }

  bool all(bool value) {
    turn_ ^= 1u;
    shared_.vote[turn_][thread_] = value;
    sync();
    bool result = true;
    for (uint32_t i = 0; i < size(); ++i) result = result && shared_.vote[turn_][i];
    return result;
  }

  float sum(float value) {
    turn_ ^= 1u;
    shared_.partial[turn_][thread_] = value;
    sync();
    float total = shared_.partial[turn_][0];
    for (uint32_t i = 1; i < size(); ++i) total += shared_.partial[turn_][i];
    return total;
  }

 private:
  HostBlock& shared_;
  uint32_t thread_;
  uint32_t block_;
  uint32_t num_blocks_;
  uint32_t turn_ = 0;
};

}  // namespace pt::cuda_fusion
