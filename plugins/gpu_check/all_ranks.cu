// SPDX-License-Identifier: Apache-2.0
#include <memory>

#include "cuda_fusion/device_coder.cuh"
#include "cuda_fusion/device_memory.cuh"
#include "cuda_fusion/one_shot.h"
#include "cuda_fusion/plan.h"
#include "cuda_fusion/pull.h"
#include "cuda_fusion/two_shot.h"
#include "cuda_fusion/workspace.h"
#include "gpu_check/ranks.h"

namespace pt::gpu_check {
namespace {

using namespace pt::cuda_fusion;
using Type = numeric::Bfloat16;

// Blocks of rank r are [r * blocks, (r + 1) * blocks). Random delays before and after move the ranks apart.
template <typename Protocol>
__global__ void __launch_bounds__(kMaxBlockThreads, 1)
    all_ranks_kernel(const Channel* channels, const Call* calls, uint32_t blocks, uint32_t seed) {
  const uint32_t rank = blockIdx.x / blocks;
  const uint32_t noise = (blockIdx.x * 2654435761u + seed * 40503u) >> 16;
  if (noise % 4 == 0) __nanosleep(noise % 4096);
  DeviceTeam team(blockIdx.x % blocks, blocks);
  Protocol::run(channels[rank], calls[rank], team);
}

template <typename Protocol>
const void* const kKernel = reinterpret_cast<const void*>(all_ranks_kernel<Protocol>);

template <typename Payload>
const void* kernel_of(Algorithm algorithm) {
  if (algorithm == Algorithm::kPull) return kKernel<Pull<DeviceMemory, Payload>>;
  if (algorithm == Algorithm::kTwoShot) return kKernel<TwoShot<DeviceMemory, Payload, 0>>;
  return kKernel<OneShot<DeviceMemory, Payload, 0>>;
}

const void* kernel_of(Algorithm algorithm, int codec) {
  const void* kernel = kernel_of<Plain<Type>>(algorithm);
  codecs::with_codec(codec,
                     [&](auto chosen) { kernel = kernel_of<Coded<WarpCoder<decltype(chosen)>, Type>>(algorithm); });
  return kernel;
}

// Workspaces, counters and records of all ranks.
class Arena {
 public:
  Arena(int size, const Layout& layout) : channels_(static_cast<size_t>(size)) {
    std::vector<unsigned char*> workspaces;
    for (int rank = 0; rank < size; ++rank) {
      unsigned char* memory = nullptr;
      GPU(cudaMalloc(&memory, layout.total()));
      std::vector<std::byte> head(Layout::inboxes());
      fill_head(head.data(), layout, static_cast<uint32_t>(rank));
      GPU(cudaMemcpy(memory, head.data(), head.size(), cudaMemcpyHostToDevice));
      const std::vector<uint32_t> inboxes(layout.inbox_vectors() * 4, kSentinel);
      GPU(cudaMemcpy(memory + Layout::inboxes(), inboxes.data(), inboxes.size() * 4, cudaMemcpyHostToDevice));
      workspaces.push_back(memory);
    }
    for (int rank = 0; rank < size; ++rank) {
      Channel& channel = channels_[static_cast<size_t>(rank)];
      for (int peer = 0; peer < size; ++peer) channel.workspaces[peer] = workspaces[static_cast<size_t>(peer)];
      const Control control = first_control();
      GPU(cudaMalloc(&channel.control, sizeof(Control)));
      GPU(cudaMemcpy(channel.control, &control, sizeof(control), cudaMemcpyHostToDevice));
      GPU(cudaHostAlloc(&channel.record, sizeof(Record), cudaHostAllocMapped));
      *channel.record = {};
      channel.layout = layout;
      channel.rank = static_cast<uint32_t>(rank);
      channel.size = static_cast<uint32_t>(size);
      channel.timeout_ns = 5'000'000'000u;
    }
    GPU(cudaMalloc(&on_device_, channels_.size() * sizeof(Channel)));
    GPU(cudaMemcpy(on_device_, channels_.data(), channels_.size() * sizeof(Channel), cudaMemcpyHostToDevice));
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() {
    cudaFree(on_device_);
    for (Channel& channel : channels_) {
      cudaFree(channel.workspaces[channel.rank]);
      cudaFree(channel.control);
      cudaFreeHost(channel.record);
    }
  }
  const Channel* on_device() const { return on_device_; }
  bool healthy() const {
    for (const Channel& channel : channels_) {
      if (channel.record->ready != 0) return false;
    }
    return true;
  }

 private:
  std::vector<Channel> channels_;
  Channel* on_device_ = nullptr;
};

void check_one(int size, Algorithm algorithm, int codec, uint64_t tokens, uint64_t hidden, int calls, Report& report) {
  const Layout layout = {static_cast<uint32_t>(size), uint64_t{1} << 18, uint64_t{1} << 20};
  const Arena arena(size, layout);
  std::vector<std::unique_ptr<Tensors>> owned;
  std::vector<const Tensors*> ranks;
  std::vector<Call> planned;
  uint32_t threads = 0;
  for (int rank = 0; rank < size; ++rank) {
    owned.push_back(std::make_unique<Tensors>(rank, tokens, hidden, true));
    ranks.push_back(owned.back().get());
    const Plan plan =
        make_plan(owned.back()->arguments(static_cast<int>(algorithm), codec), layout, Limits::defaults(size), false);
    planned.push_back(plan.call);
    threads = plan.threads;
  }
  Call* calls_on_device = nullptr;
  GPU(cudaMalloc(&calls_on_device, planned.size() * sizeof(Call)));
  GPU(cudaMemcpy(calls_on_device, planned.data(), planned.size() * sizeof(Call), cudaMemcpyHostToDevice));
  const Channel* channels = arena.on_device();
  uint64_t hash = 0;
  bool good = true;
  uint32_t blocks = 8;
  for (int call = 0; call < calls && good; ++call) {
    auto seed = static_cast<uint32_t>(call);
    // One-shot takes any grid; the others must keep theirs.
    if (algorithm == Algorithm::kOneShot) blocks = 1 + seed % 8;
    void* arguments[] = {&channels, &calls_on_device, &blocks, &seed};
    GPU(cudaLaunchCooperativeKernel(kernel_of(algorithm, codec), dim3(blocks * static_cast<uint32_t>(size)),
                                    dim3(threads), arguments, 0, nullptr));
    if (call % 500 == 0 || call + 1 == calls) {
      GPU(cudaDeviceSynchronize());
      good = arena.healthy() && same_everywhere(ranks, true, static_cast<int>(algorithm), codec, &hash);
      for (const Tensors* tensors : ranks) tensors->forget();
    }
  }
  GPU(cudaFree(calls_on_device));
  char line[256];
  std::snprintf(
      line, sizeof(line),
      R"({"check": "cooperative", "ranks": %d, "algorithm": "%s", "codec": "%s", "tokens": %llu, "calls": %d, "hash": "%016llx", "good": %s})",
      size, algorithm_name(algorithm), kCodecNames[codec], static_cast<unsigned long long>(tokens), calls,
      static_cast<unsigned long long>(hash), good ? "true" : "false");
  report.add(line, good);
}

}  // namespace

void check_cooperative(int size, int calls, Report& report) {
  constexpr int kNone = PT_CODEC_NONE;
  for (const uint64_t tokens : {1, 7}) check_one(size, Algorithm::kOneShot, kNone, tokens, 4096, calls, report);
  for (const Algorithm algorithm : {Algorithm::kPull, Algorithm::kTwoShot}) {
    for (const uint64_t tokens : {3, 300}) check_one(size, algorithm, kNone, tokens, 4096, calls / 4, report);
  }
  // Also rows that end inside a group and inside a warp's turn.
  for (int codec = PT_CODEC_INT8; codec <= PT_CODEC_MXFP4; ++codec) {
    for (const uint64_t hidden : {4096, 1000}) {
      check_one(size, Algorithm::kOneShot, codec, 7, hidden, calls / 4, report);
      check_one(size, Algorithm::kPull, codec, 300, hidden, calls / 8, report);
      check_one(size, Algorithm::kTwoShot, codec, 300, hidden, calls / 8, report);
    }
  }
}

}  // namespace pt::gpu_check
