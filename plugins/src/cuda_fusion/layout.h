// SPDX-License-Identifier: Apache-2.0
// What lies where: one workspace per rank, the same offsets on all of them, mapped by all of them; a private control
// block; a record the host can see.
#pragma once

#include "cuda_fusion/limits.h"
#include "cuda_fusion/vector.h"

namespace pt::cuda_fusion {

constexpr uint32_t kMagic = 0x46435450u;  // "PTCF"
constexpr uint32_t kLayoutVersion = 1;
constexpr int kMaxBlocks = 64;
// Leaves each thread 128 registers: eight vectors in flight and their sums.
constexpr int kMaxBlockThreads = 512;
constexpr int kGenerations = 3;         // of the one-shot inboxes: see README.md
constexpr int kStagingGenerations = 2;  // of pull and two-shot
constexpr size_t kHeaderBytes = 4096;
constexpr size_t kLineBytes = 128;

// Shortly before the 32-bit counters wrap, so that every run of some length exercises the wrap.
constexpr uint32_t kFirstEpoch = 0xFFFFFF00u;

enum class Phase : uint32_t { kFirst = 0, kSecond = 1 };
constexpr int kNumPhases = 2;

// Start of a workspace. Peers write `abort` and `probe` only. Memory starts as: header, flags and staged_epoch at
// kFirstEpoch, inboxes full of the sentinel.
struct alignas(kLineBytes) Header {
  uint32_t magic;
  uint32_t layout_version;
  uint32_t size;
  uint32_t rank;
  uint32_t abort;             // 1 + the rank that gave up; 0: all is well
  uint32_t probe[kMaxRanks];  // what each peer wrote when the channel was opened
};

// One rank's own counters, in its own memory. They advance on the device: a replayed graph counts like a new launch.
struct alignas(kLineBytes) Control {
  uint32_t one_shot_epoch;  // calls so far
  uint32_t one_shot_generation;
  uint32_t one_shot_clear;  // vectors that the call before left in its generation
  uint32_t one_shot_arrived;
  uint32_t staged_epoch;  // pieces so far, of pull, two-shot and nvls
  uint32_t staged_arrived;
  uint32_t claimed;  // the first thread to fail writes the record
};

enum class Failure : uint32_t { kNone = 0, kTimeout = 1, kAborted = 2, kNotConnected = 3 };

// Where the host learns what a kernel met. In memory that both can reach.
struct alignas(kLineBytes) Record {
  uint32_t ready;  // stored last
  Failure failure;
  uint32_t rank;
  uint32_t peer;
  Algorithm algorithm;
  Phase phase;
  uint32_t epoch;
  uint32_t abort_request;  // written by the host
};

// Offsets inside a workspace for `size` ranks. `one_shot_bytes`, `staging_bytes`: room for one message, multiples of
// 16.
struct Layout {
  uint32_t size;
  uint64_t one_shot_bytes;
  uint64_t staging_bytes;

  PT_HOST_DEVICE static constexpr uint64_t signals() { return kHeaderBytes; }
  // A block's flags of one phase share a line: [phase][block][rank]
  PT_HOST_DEVICE static constexpr uint64_t signal(Phase phase, uint32_t block, uint32_t rank) {
    return signals() + (static_cast<uint64_t>(phase) * kMaxBlocks + block) * kLineBytes + rank * sizeof(uint32_t);
  }
  PT_HOST_DEVICE static constexpr uint64_t inboxes() { return signals() + kNumPhases * kMaxBlocks * kLineBytes; }
  PT_HOST_DEVICE constexpr uint64_t inbox(uint32_t generation) const {
    return inboxes() + generation * size * one_shot_bytes;
  }
  PT_HOST_DEVICE constexpr uint64_t inbox_vectors() const {
    return kGenerations * size * one_shot_bytes / sizeof(Vector);
  }
  // Pull stages its message here, two-shot receives the slices it has to add.
  PT_HOST_DEVICE constexpr uint64_t scatter(uint32_t epoch) const {
    return inbox(kGenerations) + epoch % kStagingGenerations * 2 * staging_bytes;
  }
  // Two-shot receives the sums of all slices here.
  PT_HOST_DEVICE constexpr uint64_t gather(uint32_t epoch) const { return scatter(epoch) + staging_bytes; }
  constexpr uint64_t total() const { return inbox(kGenerations) + kStagingGenerations * 2 * staging_bytes; }
};

static_assert(sizeof(Header) <= kHeaderBytes && kMaxRanks * sizeof(uint32_t) <= kLineBytes);
static_assert((int64_t{1} << 32) % kStagingGenerations == 0, "the parity of an epoch survives its wrap");

}  // namespace pt::cuda_fusion
