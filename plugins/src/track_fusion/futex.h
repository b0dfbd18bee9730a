// SPDX-License-Identifier: Apache-2.0
// The futex calls on words in shared memory (no FUTEX_PRIVATE_FLAG: waiter and waker are different processes).
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdint>

namespace pt::track_fusion {

// Sleeps while the word equals `expected`, at most `seconds`. Returns 0 or the errno (EAGAIN, ETIMEDOUT, EINTR).
inline int futex_wait(std::atomic<uint32_t>& word, uint32_t expected, double seconds) noexcept {
  timespec limit;
  limit.tv_sec = static_cast<time_t>(seconds);
  limit.tv_nsec = static_cast<long>((seconds - static_cast<double>(limit.tv_sec)) * 1e9);
  const long result =
      ::syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, expected, &limit, nullptr, 0);
  return result == 0 ? 0 : errno;
}

inline void futex_wake_all(std::atomic<uint32_t>& word) noexcept {
  ::syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace pt::track_fusion
