// SPDX-License-Identifier: Apache-2.0
// Ranks as threads that exchange a few bytes, as while a channel is opened.
#pragma once

#include <thread>
#include <vector>

#include "cuda_fusion/exchange.h"
#include "meeting.h"

namespace pt::testing {

using cuda_fusion::Exchange;

template <typename Body>
void as_ranks(int size, const Body& body) {
  Meeting meeting(size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      Seat seat = {&meeting, rank};
      body(rank, Exchange(gather, &seat, size));
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace pt::testing
