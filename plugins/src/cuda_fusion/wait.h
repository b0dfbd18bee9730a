// SPDX-License-Identifier: Apache-2.0
// Bounded waiting. A thread that gives up writes the record and tells every rank, and from then on waits for nothing:
// it still walks through the whole protocol, so that no barrier of its block is left half full.
#pragma once

#include "cuda_fusion/call.h"

namespace pt::cuda_fusion {
namespace {

template <typename Memory>
class Waiter {
 public:
  PT_HOST_DEVICE Waiter(const Channel& channel, Algorithm algorithm, uint32_t epoch)
      : channel_(channel), algorithm_(algorithm), epoch_(epoch) {
    Header* own = channel.header(channel.rank);
    if (own->magic != kMagic || own->layout_version != kLayoutVersion) {
      give_up(Failure::kNotConnected, channel.rank, Phase::kFirst);
      return;
    }
    const uint32_t aborted_by = Memory::load_relaxed(&own->abort);
    alive_ = aborted_by == 0;
    if (!alive_) give_up(Failure::kAborted, aborted_by - 1, Phase::kFirst);  // by a peer that came here first
  }

  PT_HOST_DEVICE bool alive() const { return alive_; }
  PT_HOST_DEVICE void fail() { alive_ = false; }
  PT_HOST_DEVICE void next_epoch() { ++epoch_; }
  // Progress was made: the limit starts again.
  PT_HOST_DEVICE void restart() { started_ns_ = 0; }

  // After a look in vain. False: stop looking.
  PT_HOST_DEVICE bool keep_waiting(uint32_t peer, Phase phase) {
    if (!alive_) return false;
    Memory::pause();
    if (++polls_ % Memory::kPollsPerCheck != 0) return true;
    const uint32_t aborted_by = Memory::load_relaxed(&channel_.header(channel_.rank)->abort);
    if (aborted_by != 0) {
      give_up(Failure::kAborted, aborted_by - 1, phase);
      return false;
    }
    if (Memory::load_relaxed(&channel_.record->abort_request) != 0) {
      give_up(Failure::kAborted, channel_.rank, phase);
      return false;
    }
    const uint64_t now_ns = Memory::now_ns();
    if (started_ns_ == 0) started_ns_ = now_ns;
    if (channel_.timeout_ns != 0 && now_ns - started_ns_ > channel_.timeout_ns) {
      give_up(Failure::kTimeout, peer, phase);
      return false;
    }
    return true;
  }

 private:
  PT_HOST_DEVICE void give_up(Failure failure, uint32_t peer, Phase phase) {
    alive_ = false;
    if (Memory::claim(&channel_.control->claimed)) {
      Record* record = channel_.record;
      record->failure = failure;
      record->rank = channel_.rank;
      record->peer = peer;
      record->algorithm = algorithm_;
      record->phase = phase;
      record->epoch = epoch_;
      Memory::store_release(&record->ready, 1u);
    }
    if (failure == Failure::kNotConnected) return;
    const uint32_t first = failure == Failure::kAborted ? peer : channel_.rank;
    for (uint32_t other = 0; other < channel_.size; ++other) {
      Memory::store_relaxed(&channel_.header(other)->abort, first + 1);
    }
  }

  const Channel& channel_;
  Algorithm algorithm_;
  uint32_t epoch_;
  uint32_t polls_ = 0;
  uint64_t started_ns_ = 0;
  bool alive_ = false;
};

}  // namespace
}  // namespace pt::cuda_fusion
