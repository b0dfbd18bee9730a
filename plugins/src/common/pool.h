// SPDX-License-Identifier: Apache-2.0
// A few threads that wait for pieces of one job at a time.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace pt {

// Pieces are claimed one by one, so a thread that the system keeps waiting delays nobody: the caller does what is left
// and waits for claimed pieces only. Which thread computes a piece does not matter to its result.
class Pool {
 public:
  // Calls run(context, worker, piece) for 0 <= piece < pieces on the caller (worker 0) and up to threads - 1 others;
  // on the caller alone while somebody else uses the pool. `run` must not throw.
  using Run = void (*)(void* context, int worker, uint32_t piece);
  void run(Run run, void* context, uint32_t pieces, int threads);

  static Pool& shared();

  Pool() = default;
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  ~Pool();

 private:
  void grow(int threads);
  void work(uint32_t index);
  void help(uint32_t generation, int worker);

  std::mutex callers_;
  std::vector<std::thread> threads_;
  pid_t owner_ = 0;
  // The job. A claim is generation << 32 | pieces that are left: in one word, because a thread that comes late to a job
  // must see that nothing of it is left while the fields of the next one are being written.
  std::atomic<Run> run_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<uint32_t> pieces_{0};
  std::atomic<uint32_t> helpers_{0};
  alignas(64) std::atomic<uint64_t> claim_{0};
  alignas(64) std::atomic<uint32_t> finished_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  std::atomic<bool> stopping_{false};
};

}  // namespace pt
