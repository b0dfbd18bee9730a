// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <memory>
#include <optional>
#include <string>

#include "codecs/message.h"
#include "common/error.h"
#include "common/shared_segment.h"
#include "track_fusion/kernels.h"
#include "track_fusion/layout.h"
#include "track_fusion/peer_watch.h"

namespace pt::track_fusion {

struct FuseArgs {
  const void* x;
  const void* residual;
  void* h;
  size_t tokens;
  size_t hidden;
  int dtype;
  int reduction;
  const void* gamma;
  size_t num_gammas;
  int gamma_dtype;
  float eps;
  void* norm_out;
};

// Pieces of this size keep both generations of all inboxes of a small group inside the caches.
constexpr size_t kPieceBytes = size_t{256} << 10;

inline float scale_of(const FuseArgs& args, int size) {
  return args.reduction == PT_MEAN ? 1.0f / static_cast<float>(size) : 1.0f;
}

struct CodecArgs {
  int codec;  // not PT_CODEC_NONE
  bool delta;
  int algorithm;
};

// One rank's membership. The contract is in pt/track_fusion.h, the protocol in README.md.
class Group {
 public:
  static std::unique_ptr<Group> create(int size, size_t capacity_bytes, double timeout_s);
  static std::unique_ptr<Group> attach(const std::string& name, int rank, int size, double timeout_s);
  // Ranks that are threads of one process can share a mapping (the tests under ThreadSanitizer need that).
  static std::unique_ptr<Group> attach(std::shared_ptr<SharedSegment> segment, int rank, int size, double timeout_s);

  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;
  ~Group();

  int rank() const { return rank_; }
  const std::shared_ptr<SharedSegment>& segment() const { return segment_; }
  const std::string& name() const { return segment_->name(); }
  const char* isa() const { return kernels_->name; }

  void unlink(double timeout_s);
  void fuse(const FuseArgs& args, double timeout_s);
  void fuse_coded(const FuseArgs& args, const CodecArgs& coding, double timeout_s);
  void all_reduce(const void* x, void* out, size_t count, int dtype, double timeout_s);
  void broadcast(void* buffer, size_t bytes, int root, double timeout_s);
  void gather(const void* in, size_t rows, size_t row_bytes, void* out, int root, double timeout_s);
  void barrier(double timeout_s);
  bool poll(int peer, double timeout_s);
  void abort(const char* reason) noexcept;
  // Marks this rank as closed. Refuses while another thread is inside a call.
  void close();

 private:
  Group(std::shared_ptr<SharedSegment> segment, int rank, int size, double timeout_s);

  // --- group.cpp: life cycle and failure
  // Runs one collective: one caller at a time, refuses a failed group, poisons the group when `body` throws.
  template <typename Body>
  void run(const CallRecord& record, double timeout_s, Body&& body);
  void check_healthy() const;
  void poison(const Error& error) noexcept;
  void publish_abort(const char* reason) noexcept;
  Error aborted_by_peer() const;

  // --- sync.cpp: steps and waiting
  // Makes the own inbox and call record of the next step writable: every peer has finished the step before the last.
  void begin_step();
  // Publishes the inbox: everything written before is visible to a peer that sees the new epoch.
  void post();
  // Wait until that peer, or every peer, has posted the step this rank posted last.
  void await(int peer) { await_epoch(peer, epoch_); }
  void await_all();
  void await_epoch(int peer, uint32_t epoch);
  bool reach(int peer, uint32_t epoch, double timeout_s, bool soft);
  bool wait_slowly(int peer, uint32_t epoch, double timeout_s, bool soft);
  void verify_call(int peer, uint32_t epoch);
  void check_peers(int peer, uint32_t epoch, double waited_s);
  [[noreturn]] void fail_waiting(pt_status status, int peer, double waited_s, const char* why);
  std::string missing_peers(int except, uint32_t epoch) const;

  // --- fuse.cpp
  void reduce(const FuseArgs& args);
  void reduce_one_shot(const FuseArgs& args);
  void reduce_two_phase(const FuseArgs& args);
  bool takes_two_phases(const FuseArgs& args) const;
  void norm_rows(const FuseArgs& args, size_t first_row, size_t last_row) const;

  // --- fuse_coded.cpp
  void reduce_coded_one_shot(const FuseArgs& args, const CodecArgs& coding);
  void reduce_coded_two_shot(const FuseArgs& args, const CodecArgs& coding);
  codecs::Format format_of(const CodecArgs& coding) const;

  Header& header() const { return *reinterpret_cast<Header*>(base()); }
  RankFlag& flag(int rank) const { return *reinterpret_cast<RankFlag*>(base() + layout_.flag(rank)); }
  int pid(int rank) const { return info(rank).pid.load(std::memory_order_relaxed); }
  RankInfo& info(int rank) const { return *reinterpret_cast<RankInfo*>(base() + layout_.info(rank)); }
  std::byte* inbox(int rank) const { return base() + layout_.inbox(rank, step_ % kGenerations); }
  std::byte* base() const { return segment_->data(); }

  std::shared_ptr<SharedSegment> segment_;
  const int rank_;
  const int size_;
  const double timeout_s_;
  const Layout layout_;
  const Kernels* kernels_;
  size_t capacity_;
  int spin_limit_;

  uint32_t epoch_ = kFirstEpoch;  // last step posted
  uint32_t step_ = kFirstEpoch;   // step whose inboxes are in use: epoch_, or epoch_ + 1 after begin_step()
  uint64_t call_ = 0;             // public calls so far, for messages
  double call_timeout_s_ = 0;
  CallRecord record_ = {};
  std::array<CallRecord, kGenerations> own_calls_ = {};
  std::array<uint32_t, PT_TRACK_FUSION_MAX_RANKS> seen_;      // newest epoch observed per peer
  std::array<uint32_t, PT_TRACK_FUSION_MAX_RANKS> verified_;  // newest step whose call record was compared
  std::array<std::optional<PeerWatch>, PT_TRACK_FUSION_MAX_RANKS> watches_;
  std::optional<Error> failure_;
  std::atomic<bool> busy_ = false;
};

// Holds the group for one caller; a second one is told so instead of corrupting the protocol.
class BusyGuard {
 public:
  explicit BusyGuard(std::atomic<bool>& busy) : busy_(busy) {
    PT_REQUIRE(!busy_.exchange(true, std::memory_order_acquire),
               "the group is in use by another thread; a group serves one thread at a time");
  }
  BusyGuard(const BusyGuard&) = delete;
  BusyGuard& operator=(const BusyGuard&) = delete;
  ~BusyGuard() { busy_.store(false, std::memory_order_release); }

 private:
  std::atomic<bool>& busy_;
};

template <typename Body>
void Group::run(const CallRecord& record, double timeout_s, Body&& body) {
  const BusyGuard guard(busy_);
  record_ = record;
  ++call_;
  check_healthy();
  call_timeout_s_ = timeout_s < 0 ? timeout_s_ : timeout_s;
  try {
    body();
  } catch (const Error& error) {
    poison(error);
    throw;
  } catch (const std::exception& error) {
    poison(Error(PT_INTERNAL, error.what()));
    throw;
  }
}

}  // namespace pt::track_fusion
