// SPDX-License-Identifier: Apache-2.0
#include "attention/parallel.h"

#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace pt::attention {
namespace {

struct Job {
  size_t count;
  void (*body)(void* context, int worker, size_t item);
  void* context;
  std::atomic<size_t> next{0};

  void run(int worker) {
    for (size_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(context, worker, item);
  }
};

// Sleeping threads rather than spinning ones: other ranks want the cores.
class Pool {
 public:
  // False: somebody else is using it.
  bool run(int num_helpers, Job& job) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (num_threads_ < num_helpers) {
        std::thread(&Pool::serve, this, num_threads_ + 1, generation_).detach();
        ++num_threads_;
      }
      job_ = &job;
      wanted_ = num_helpers;
      running_ = num_helpers;
      ++generation_;
    }
    wake_.notify_all();
    job.run(0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return running_ == 0; });
    return true;
  }

 private:
  void serve(int worker, unsigned seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (worker > wanted_) continue;
      Job* job = job_;
      lock.unlock();
      job->run(worker);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex owner_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  unsigned generation_ = 0;
  int num_threads_ = 0, wanted_ = 0, running_ = 0;
};

// Never destroyed: its threads may outlive main. A forked child has no threads in it and makes its own.
Pool& pool() {
  static std::mutex mutex;
  static Pool* current = nullptr;
  static pid_t owner = 0;
  std::lock_guard<std::mutex> lock(mutex);
  if (owner != ::getpid()) {
    current = new Pool;
    owner = ::getpid();
  }
  return *current;
}

}  // namespace

void parallel_for(int num_threads, size_t count, void (*body)(void* context, int worker, size_t item), void* context) {
  Job job{count, body, context};
  const size_t useful = static_cast<size_t>(num_threads) < count ? static_cast<size_t>(num_threads) : count;
  if (useful <= 1 || !pool().run(static_cast<int>(useful) - 1, job)) job.run(0);
}

}  // namespace pt::attention
