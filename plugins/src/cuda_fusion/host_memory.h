// SPDX-License-Identifier: Apache-2.0
// The memory model of host threads: what device_memory.cuh does with PTX, with std::atomic. Words that are polled are
// atomic; staged data are plain, so that ThreadSanitizer checks that the flags order them.
#pragma once

#include <sched.h>

#include <atomic>
#include <chrono>

#include "cuda_fusion/vector.h"

namespace pt::cuda_fusion {

struct HostMemory {
  static constexpr uint32_t kPollsPerCheck = 64;

  static Vector load_relaxed(const Vector* from) {
    Vector v;
    for (int i = 0; i < 4; ++i) v.word[i] = load_relaxed(from->word + i);
    return v;
  }
  static void store_relaxed(Vector* to, const Vector& v) {
    for (int i = 0; i < 4; ++i) store_relaxed(to->word + i, v.word[i]);
  }
  static uint32_t load_relaxed(const uint32_t* from) { return atomic(from).load(std::memory_order_relaxed); }
  static void store_relaxed(uint32_t* to, uint32_t value) { atomic(to).store(value, std::memory_order_relaxed); }
  static uint32_t load_acquire(const uint32_t* from) { return atomic(from).load(std::memory_order_acquire); }
  static void store_release(uint32_t* to, uint32_t value) { atomic(to).store(value, std::memory_order_release); }
  static uint32_t arrive(uint32_t* counter) { return atomic(counter).fetch_add(1, std::memory_order_acq_rel); }
  static bool claim(uint32_t* word) { return atomic(word).exchange(1, std::memory_order_acq_rel) == 0; }
  static void fence() {
#if !defined(__SANITIZE_THREAD__)  // which does not model fences
    std::atomic_thread_fence(std::memory_order_acq_rel);
#endif
  }
  static void pause() { ::sched_yield(); }
  static uint64_t now_ns() {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(now).count());
  }

 private:
  static std::atomic_ref<uint32_t> atomic(const uint32_t* word) {
    return std::atomic_ref<uint32_t>(*const_cast<uint32_t*>(word));
  }
};

}  // namespace pt::cuda_fusion
