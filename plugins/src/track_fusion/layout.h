// SPDX-License-Identifier: Apache-2.0
// What lies where in the shared segment: header, one control block per rank, then the inboxes.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "pt/track_fusion.h"
#include "track_fusion/call_record.h"

namespace pt::track_fusion {

constexpr uint64_t kMagic = 0x3146545f4b525450;  // "PTRK_TF1"
constexpr uint32_t kLayoutVersion = 1;
constexpr size_t kGenerations = 2;
// Two lines: adjacent-line prefetch would otherwise couple neighbouring ranks' flags.
constexpr size_t kLineBytes = 128;
constexpr size_t kMinCapacity = 4096;
constexpr size_t kMaxCapacity = size_t{1} << 30;
// Shortly before the 32-bit counter wraps, so that every run of some length exercises the wrap.
constexpr uint32_t kFirstEpoch = 0xFFFFFF00u;

enum class AttachState : uint32_t { kFree = 0, kClaimed = 1, kAttached = 2, kClosed = 3 };
enum class AbortState : uint32_t { kNone = 0, kWriting = 1, kReady = 2 };

// The only memory touched on the fast path: flag and call record share one cache line.
struct alignas(kLineBytes) RankFlag {
  std::atomic<uint32_t> epoch;     // futex word; release store = "my inbox of this step is full, older ones are read"
  std::atomic<uint32_t> sleepers;  // waiters inside FUTEX_WAIT on `epoch`
  CallRecord calls[kGenerations];  // what the rank called in step `epoch`, by parity
};

struct alignas(kLineBytes) RankInfo {
  std::atomic<AttachState> state;
  std::atomic<int32_t> pid;
  uint64_t start_time;  // field 22 of /proc/<pid>/stat: tells a reused pid from the original
};

struct alignas(kLineBytes) Header {
  std::atomic<uint64_t> magic;  // stored last by the creator
  uint32_t layout_version;
  uint32_t size;
  uint64_t capacity_bytes;
  uint64_t total_bytes;
  uint64_t pid_namespace;
  std::atomic<uint32_t> num_attached;
  alignas(kLineBytes) std::atomic<AbortState> abort_state;
  int32_t abort_rank;
  char abort_reason[1024];
};

static_assert(std::atomic<uint32_t>::is_always_lock_free && std::atomic<uint64_t>::is_always_lock_free);
static_assert(sizeof(RankFlag) == kLineBytes && offsetof(RankFlag, calls) + sizeof(RankFlag::calls) <= 64);

// Offsets inside a segment for `size` ranks; all inboxes start on a page.
class Layout {
 public:
  Layout(int size, size_t capacity_bytes) : size_(static_cast<size_t>(size)), capacity_(capacity_bytes) {}

  static size_t round_capacity(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }
  size_t flag(int rank) const { return sizeof(Header) + static_cast<size_t>(rank) * sizeof(RankFlag); }
  size_t info(int rank) const { return flag(static_cast<int>(size_)) + static_cast<size_t>(rank) * sizeof(RankInfo); }
  size_t inbox(int rank, uint32_t generation) const {
    const size_t control = (info(static_cast<int>(size_)) + kPage - 1) / kPage * kPage;
    return control + (static_cast<size_t>(rank) * kGenerations + generation) * capacity_;
  }
  size_t total_bytes() const { return inbox(static_cast<int>(size_), 0); }

 private:
  static constexpr size_t kPage = 4096;
  size_t size_;
  size_t capacity_;
};

}  // namespace pt::track_fusion
