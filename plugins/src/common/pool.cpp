// SPDX-License-Identifier: Apache-2.0
#include "common/pool.h"

#include <unistd.h>

#include <chrono>

namespace pt {
namespace {

// Longer than the gap between two products of one decode step, short enough to leave the core to others.
constexpr std::chrono::microseconds kSpin{50};

inline void pause_once() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Spins for a while, then sleeps, until the word differs from `old`.
template <typename Word>
void await_change(const std::atomic<Word>& word, Word old) {
  const auto limit = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (word.load(std::memory_order_acquire) != old) return;
      pause_once();
    }
  } while (std::chrono::steady_clock::now() < limit);
  word.wait(old, std::memory_order_acquire);
}

}  // namespace

Pool& Pool::shared() {
  // Never destroyed: threads may still sleep in it while the process ends.
  static Pool* const pool = new Pool;
  return *pool;
}

Pool::~Pool() {
  stopping_.store(true);
  generation_.fetch_add(1);
  generation_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Pool::grow(int threads) {
  if (owner_ != ::getpid()) {
    // After a fork the threads are the parent's: their handles are given up, not joined.
    for (std::thread& thread : threads_) thread.detach();
    threads_.clear();
    owner_ = ::getpid();
  }
  while (static_cast<int>(threads_.size()) < threads - 1) {
    threads_.emplace_back(&Pool::work, this, static_cast<uint32_t>(threads_.size()));
  }
}

void Pool::run(Run run, void* context, uint32_t pieces, int threads) {
  std::unique_lock<std::mutex> lock(callers_, std::defer_lock);
  if (threads <= 1 || pieces <= 1 || !lock.try_lock()) {
    for (uint32_t piece = 0; piece < pieces; ++piece) run(context, 0, piece);
    return;
  }
  grow(threads);
  const uint32_t generation = generation_.load(std::memory_order_relaxed) + 1;
  // Nothing is left of the old job, so nobody takes these fields for it.
  run_.store(run, std::memory_order_relaxed);
  context_.store(context, std::memory_order_relaxed);
  pieces_.store(pieces, std::memory_order_relaxed);
  helpers_.store(static_cast<uint32_t>(threads - 1), std::memory_order_relaxed);
  finished_.store(0, std::memory_order_relaxed);
  claim_.store(static_cast<uint64_t>(generation) << 32 | pieces, std::memory_order_release);
  generation_.store(generation, std::memory_order_release);
  generation_.notify_all();
  help(generation, 0);
  uint32_t finished;
  while ((finished = finished_.load(std::memory_order_acquire)) != pieces) await_change(finished_, finished);
}

void Pool::work(uint32_t index) {
  uint32_t seen = 0;
  while (!stopping_.load(std::memory_order_acquire)) {
    const uint32_t generation = generation_.load(std::memory_order_acquire);
    if (generation != seen) {
      seen = generation;
      if (index < helpers_.load(std::memory_order_relaxed)) help(generation, static_cast<int>(index) + 1);
    }
    await_change(generation_, seen);
  }
}

void Pool::help(uint32_t generation, int worker) {
  uint64_t claim = claim_.load(std::memory_order_acquire);
  while (claim >> 32 == generation && static_cast<uint32_t>(claim) != 0) {
    const uint32_t left = static_cast<uint32_t>(claim);
    const uint32_t pieces = pieces_.load(std::memory_order_acquire);
    const Run run = run_.load(std::memory_order_acquire);
    void* const context = context_.load(std::memory_order_acquire);
    // Success means that this job still had an open piece, so the fields read before are its own.
    if (!claim_.compare_exchange_weak(claim, claim - 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
    run(context, worker, pieces - left);
    if (finished_.fetch_add(1, std::memory_order_acq_rel) + 1 == pieces) finished_.notify_all();
    claim = claim_.load(std::memory_order_acquire);
  }
}

}  // namespace pt
