// SPDX-License-Identifier: Apache-2.0
// The few lines of test framework these tests need.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "track_fusion/group.h"

#define CHECK(condition)                                                                 \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                      \
    }                                                                                    \
  } while (false)

#define CHECK_CONTAINS(text, part)                                                                                   \
  do {                                                                                                               \
    const std::string checked_text = (text);                                                                         \
    if (checked_text.find(part) == std::string::npos) {                                                              \
      std::fprintf(stderr, "%s:%d: '%s' does not contain '%s'\n", __FILE__, __LINE__, checked_text.c_str(), (part)); \
      std::exit(1);                                                                                                  \
    }                                                                                                                \
  } while (false)

namespace pt::testing {

constexpr int kSkip = 77;

// Runs `body(group, rank)` on `size` threads as ranks of one group over one mapping.
inline void run_ranks(int size, size_t capacity_bytes, double timeout_s,
                      const std::function<void(track_fusion::Group&, int)>& body) {
  std::vector<std::unique_ptr<track_fusion::Group>> groups;
  groups.push_back(track_fusion::Group::create(size, capacity_bytes, timeout_s));
  for (int rank = 1; rank < size; ++rank) {
    groups.push_back(track_fusion::Group::attach(groups[0]->segment(), rank, size, timeout_s));
  }
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) threads.emplace_back([&, rank] { body(*groups[rank], rank); });
  for (std::thread& thread : threads) thread.join();
}

// Status and text of what `body` throws; PT_OK when it does not.
inline Error caught(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    return error;
  }
  return Error(PT_OK, "");
}

}  // namespace pt::testing
