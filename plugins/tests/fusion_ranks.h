// SPDX-License-Identifier: Apache-2.0
// Ranks as threads that exchange a few bytes, as while a channel is opened.
#pragma once

#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include "cuda_fusion/exchange.h"

namespace pt::testing {

using cuda_fusion::Exchange;

class Meeting {
 public:
  explicit Meeting(size_t size) : size_(size) {}
  void all_gather(size_t rank, const void* send, void* receive, size_t bytes) {
    std::unique_lock lock(mutex_);
    room_.resize(bytes * size_);
    std::memcpy(room_.data() + bytes * rank, send, bytes);
    wait(lock);
    std::memcpy(receive, room_.data(), bytes * size_);
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
  size_t size_;
  size_t arrived_ = 0;
  int round_ = 0;
  std::vector<char> room_;
  std::mutex mutex_;
  std::condition_variable all_here_;
};

struct Seat {
  Meeting* meeting;
  size_t rank;
};

inline int gather(void* context, const void* send, void* receive, size_t bytes) {
  const Seat* seat = static_cast<Seat*>(context);
  seat->meeting->all_gather(seat->rank, send, receive, bytes);
  return 0;
}

template <typename Body>
void as_ranks(int size, const Body& body) {
  Meeting meeting(static_cast<size_t>(size));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      Seat seat = {&meeting, static_cast<size_t>(rank)};
      body(rank, Exchange(gather, &seat, size));
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace pt::testing
