// SPDX-License-Identifier: Apache-2.0
// Every piece of every job runs once and before its call returns, whatever the sizes of the jobs before and after it.
#include <atomic>
#include <cstdlib>
#include <thread>
#include <vector>

#include "check.h"
#include "common/pool.h"

namespace {

using pt::Pool;

struct Job {
  std::vector<std::atomic<int>> runs;
  std::atomic<int> largest_worker{0};

  explicit Job(size_t pieces) : runs(pieces) {}

  static void piece(void* context, int worker, uint32_t index) {
    Job& job = *static_cast<Job*>(context);
    CHECK(index < job.runs.size());
    job.runs[index].fetch_add(1, std::memory_order_relaxed);
    int largest = job.largest_worker.load();
    while (worker > largest && !job.largest_worker.compare_exchange_weak(largest, worker)) continue;
  }

  void check(Pool& pool, int threads) {
    pool.run(piece, this, static_cast<uint32_t>(runs.size()), threads);
    for (const std::atomic<int>& count : runs) CHECK(count.load(std::memory_order_relaxed) == 1);
    CHECK(largest_worker < threads);
  }
};

}  // namespace

int main(int, char** argv) {
  const int jobs = std::atoi(argv[1]);
  Pool pool;
  // A helper that comes late to a small job must not take a piece of the large one that is being set up.
  for (int i = 0; i < jobs; ++i) {
    Job(2).check(pool, 2 + i % 2);
    Job(40).check(pool, 2 + i % 3);
  }
  // Who finds the pool in use computes alone.
  std::thread other([&] {
    for (int i = 0; i < jobs / 10; ++i) Job(7).check(pool, 3);
  });
  for (int i = 0; i < jobs / 10; ++i) Job(9).check(pool, 2);
  other.join();
}
