// SPDX-License-Identifier: Apache-2.0
// Ranks of CUDA track fusion as host threads: every CUDA thread of every block of every rank is one of them.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "cuda_fusion/host_multimem.h"
#include "cuda_fusion/host_team.h"
#include "cuda_fusion/nvls.h"
#include "cuda_fusion/one_shot.h"
#include "cuda_fusion/plan.h"
#include "cuda_fusion/pull.h"
#include "cuda_fusion/two_shot.h"
#include "cuda_fusion/workspace.h"

namespace pt::testing {

using namespace pt::cuda_fusion;

// Random waits before accesses that peers can see.
struct DelayedMemory : HostMemory {
  static void delay() {
    thread_local std::minstd_rand random(
        static_cast<unsigned>(std::hash<std::thread::id>{}(std::this_thread::get_id())));
    const unsigned draw = static_cast<unsigned>(random() % 4096);
    if (draw < 40) ::sched_yield();
    if (draw == 40) std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  static Vector load_relaxed(const Vector* from) { return delay(), HostMemory::load_relaxed(from); }
  static void store_relaxed(Vector* to, const Vector& v) { delay(), HostMemory::store_relaxed(to, v); }
  static uint32_t load_relaxed(const uint32_t* from) { return HostMemory::load_relaxed(from); }
  static void store_relaxed(uint32_t* to, uint32_t value) { delay(), HostMemory::store_relaxed(to, value); }
  static void store_release(uint32_t* to, uint32_t value) { delay(), HostMemory::store_release(to, value); }
};

struct DelayedMultimem : HostMultimem {
  template <typename Type>
  static Vector sum(const Channel& channel, uint64_t at) {
    return DelayedMemory::delay(), HostMultimem::sum<Type>(channel, at);
  }
  static void store(const Channel& channel, uint64_t at, const Vector& v) {
    DelayedMemory::delay(), HostMultimem::store(channel, at, v);
  }
};

struct FreeBytes {
  void operator()(std::byte* bytes) const { ::operator delete[](bytes, std::align_val_t{kLineBytes}); }
};
using Bytes = std::unique_ptr<std::byte[], FreeBytes>;

class FusionWorld {
 public:
  FusionWorld(int size, uint32_t num_blocks, uint32_t threads, Layout layout, double timeout_s = 60.0)
      : size_(size),
        num_blocks_(num_blocks),
        threads_(threads),
        layout_(layout),
        everybody_(static_cast<uint32_t>(size) * num_blocks * threads) {
    channels_.resize(static_cast<size_t>(size));
    controls_.assign(static_cast<size_t>(size), first_control());
    records_.resize(static_cast<size_t>(size));
    for (int rank = 0; rank < size; ++rank) {
      memory_.emplace_back(static_cast<std::byte*>(::operator new[](layout.total(), std::align_val_t{kLineBytes})));
      fill_head(memory_.back().get(), layout, static_cast<uint32_t>(rank));
      auto* inboxes = reinterpret_cast<Vector*>(memory_.back().get() + Layout::inboxes());
      for (size_t i = 0; i < layout.inbox_vectors(); ++i) inboxes[i] = filled(kSentinel);
      replicas_.emplace_back(layout.staging_bytes / sizeof(Vector), filled(0x7FC07FC0u));  // NaN: not to be used
      multicast_.of[rank] = replicas_.back().data();
    }
    for (int rank = 0; rank < size; ++rank) {
      Channel& channel = channels_[static_cast<size_t>(rank)];
      channel = {};
      for (int peer = 0; peer < size; ++peer) {
        channel.workspaces[peer] = reinterpret_cast<unsigned char*>(memory_[static_cast<size_t>(peer)].get());
      }
      channel.replica = multicast_.of[rank];
      channel.multicast = &multicast_;
      channel.control = &controls_[static_cast<size_t>(rank)];
      channel.record = &records_[static_cast<size_t>(rank)];
      channel.layout = layout;
      channel.rank = static_cast<uint32_t>(rank);
      channel.size = static_cast<uint32_t>(size);
      channel.timeout_ns = static_cast<uint64_t>(timeout_s * 1e9);
    }
  }

  int size() const { return size_; }
  uint32_t num_blocks() const { return num_blocks_; }
  uint32_t threads() const { return threads_; }
  const Layout& layout() const { return layout_; }
  Channel& channel(int rank) { return channels_[static_cast<size_t>(rank)]; }
  const Record& record(int rank) const { return records_[static_cast<size_t>(rank)]; }

  // body(rank, team, kernel_boundary) on every thread; kernel_boundary() waits for all threads of the rank, and is
  // true on one of them. All begin together: no rank waits while the threads of another are still being made.
  template <typename Body>
  void run(const Body& body) {
    std::vector<std::thread> threads;
    std::vector<std::unique_ptr<HostBlock>> blocks;
    std::vector<std::unique_ptr<HostBlock>> ranks;
    for (int rank = 0; rank < size_; ++rank) {
      ranks.push_back(std::make_unique<HostBlock>(num_blocks_ * threads_));
      for (uint32_t block = 0; block < num_blocks_; ++block) {
        blocks.push_back(std::make_unique<HostBlock>(threads_));
        for (uint32_t thread = 0; thread < threads_; ++thread) {
          threads.emplace_back(
              [&, this, rank, block, thread, in_rank = ranks.back().get(), in_block = blocks.back().get()] {
                HostTeam team(*in_block, thread, block, num_blocks_);
                everybody_.sync();
                body(rank, team, [&] {
                  in_rank->sync();
                  return block == 0 && thread == 0;
                });
              });
        }
      }
    }
    for (std::thread& thread : threads) thread.join();
  }

 private:
  int size_;
  uint32_t num_blocks_;
  uint32_t threads_;
  Layout layout_;
  HostBlock everybody_;
  std::vector<Channel> channels_;
  std::vector<Control> controls_;
  std::vector<Record> records_;
  std::vector<Bytes> memory_;
  std::vector<std::vector<Vector>> replicas_;
  HostReplicas multicast_ = {};
};

template <typename Memory, typename Payload, int kRanks>
void run_protocol(Algorithm algorithm, const Channel& channel, const Call& call, HostTeam& team) {
  switch (algorithm) {
    case Algorithm::kOneShot:
      return OneShot<Memory, Payload, kRanks>::run(channel, call, team);
    case Algorithm::kPull:
      return Pull<Memory, Payload>::run(channel, call, team);
    case Algorithm::kTwoShot:
      return TwoShot<Memory, Payload, kRanks>::run(channel, call, team);
    case Algorithm::kNvls:
      return Nvls<Memory, DelayedMultimem, typename Payload::Type>::run(channel, call, team);
    default:
      CHECK(false);
  }
}

// Small integers and some zeros of both signs.
inline float fusion_input(int rank, unsigned call, size_t i) {
  const size_t mixed = (i * 2654435761u + call * 40503u + static_cast<size_t>(rank) * 97u) % 61;
  return mixed < 8 ? -0.0f : static_cast<float>(static_cast<int>(mixed) - 30) * 0.125f;
}

}  // namespace pt::testing
