// SPDX-License-Identifier: Apache-2.0
// Ranks in one process over one GPU, through the C ABI.
#pragma once

#include <thread>

#include "gpu_check/ranks.h"
#include "tests/meeting.h"

namespace pt::gpu_check {

using testing::gather;
using testing::Meeting;
using testing::Seat;

inline void require(int status) {
  if (status == PT_OK) return;
  std::fprintf(stderr, "%s\n", pt_cuda_fusion_last_error());
  std::exit(1);
}

// Channels of all ranks in one process, a stream for each.
class World {
 public:
  World(int size, bool nccl) : meeting_(size), seats_(static_cast<size_t>(size)), channels_(seats_.size()) {
    together([&](size_t rank) {
      seats_[rank] = {&meeting_, static_cast<int>(rank)};
      pt_cuda_fusion_config config = {};
      config.struct_bytes = sizeof(config);
      config.size = size;
      config.rank = static_cast<int>(rank);
      config.provider = PT_FUSION_SAME_PROCESS;
      config.device = 0;
      config.num_blocks = 8;  // all ranks share the GPU: the blocks of all must be resident at once
      config.timeout_s = 5.0;
      config.use_nccl = nccl;
      require(pt_cuda_fusion_open(&config, gather, &seats_[rank], &channels_[rank]));
    });
    for (size_t rank = 0; rank < channels_.size(); ++rank) {
      cudaStream_t stream = nullptr;
      GPU(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
      streams_.push_back(stream);
    }
    GPU(cudaEventCreateWithFlags(&fork_, cudaEventDisableTiming));
    GPU(cudaEventCreateWithFlags(&join_, cudaEventDisableTiming));
  }
  World(const World&) = delete;
  World& operator=(const World&) = delete;
  ~World() {
    together([&](size_t rank) { require(pt_cuda_fusion_close(channels_[rank])); });
    for (cudaStream_t stream : streams_) cudaStreamDestroy(stream);
    cudaEventDestroy(fork_);
    cudaEventDestroy(join_);
  }

  // One call of every rank. With NCCL each rank needs its own thread.
  void fuse(const std::vector<const Tensors*>& ranks, int algorithm, int codec) {
    const auto one = [&](size_t rank) {
      const pt_cuda_fusion_arguments arguments = ranks[rank]->arguments(algorithm, codec);
      require(pt_cuda_fusion_fuse(channels_[rank], &arguments, streams_[rank]));
    };
    if (algorithm == PT_FUSION_NCCL) return together(one);
    for (size_t rank = 0; rank < channels_.size(); ++rank) one(rank);
  }

  // A graph of one call with a branch for each rank.
  cudaGraphExec_t capture(const std::vector<const Tensors*>& ranks, int algorithm, int codec) {
    GPU(cudaStreamBeginCapture(streams_[0], cudaStreamCaptureModeThreadLocal));
    GPU(cudaEventRecord(fork_, streams_[0]));
    for (size_t rank = 1; rank < streams_.size(); ++rank) GPU(cudaStreamWaitEvent(streams_[rank], fork_, 0));
    fuse(ranks, algorithm, codec);
    for (size_t rank = 1; rank < streams_.size(); ++rank) {
      GPU(cudaEventRecord(join_, streams_[rank]));
      GPU(cudaStreamWaitEvent(streams_[0], join_, 0));
    }
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    GPU(cudaStreamEndCapture(streams_[0], &graph));
    GPU(cudaGraphInstantiate(&executable, graph, 0));
    GPU(cudaGraphDestroy(graph));
    return executable;
  }

  cudaStream_t first_stream() const { return streams_[0]; }
  void finish() const {
    GPU(cudaDeviceSynchronize());
    for (pt_cuda_fusion* channel : channels_) require(pt_cuda_fusion_status(channel));
  }

 private:
  template <typename Body>
  void together(const Body& body) {
    std::vector<std::thread> threads;
    for (size_t rank = 0; rank < channels_.size(); ++rank) {
      threads.emplace_back([&, rank] {
        GPU(cudaSetDevice(0));
        body(rank);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }

  Meeting meeting_;
  std::vector<Seat> seats_;
  std::vector<pt_cuda_fusion*> channels_;
  std::vector<cudaStream_t> streams_;
  cudaEvent_t fork_ = nullptr;
  cudaEvent_t join_ = nullptr;
};

}  // namespace pt::gpu_check
