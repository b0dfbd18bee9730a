// SPDX-License-Identifier: Apache-2.0
// Ranks as threads of one process: the exchange that a channel is opened over.
#pragma once

#include <condition_variable>
#include <cstring>
#include <mutex>
#include <vector>

namespace pt::testing {

// All-gather between threads.
class Meeting {
 public:
  explicit Meeting(int size) : size_(size) {}

  void all_gather(int rank, const void* send, void* receive, size_t bytes) {
    std::unique_lock lock(mutex_);
    room_.resize(bytes * static_cast<size_t>(size_));
    std::memcpy(room_.data() + bytes * static_cast<size_t>(rank), send, bytes);
    wait(lock);
    std::memcpy(receive, room_.data(), room_.size());
    wait(lock);
  }

 private:
  void wait(std::unique_lock<std::mutex>& lock) {
    const int round = round_;
    if (++arrived_ == size_) {
      arrived_ = 0;
      ++round_;
      all_here_.notify_all();
      return;
    }
    all_here_.wait(lock, [&] { return round_ != round; });
  }

  int size_;
  int arrived_ = 0;
  int round_ = 0;
  std::vector<char> room_;
  std::mutex mutex_;
  std::condition_variable all_here_;
};

struct Seat {
  Meeting* meeting;
  int rank;
};

inline int gather(void* context, const void* send, void* receive, size_t bytes) {
  const Seat* seat = static_cast<Seat*>(context);
  seat->meeting->all_gather(seat->rank, send, receive, bytes);
  return 0;
}

}  // namespace pt::testing
