// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

#include "gpu_check/ranks.h"

namespace pt::gpu_check {
namespace {

// All-gather between threads.
class Meeting {
 public:
  explicit Meeting(int size) : size_(size) {}

  void all_gather(int rank, const void* send, void* receive, size_t bytes) {
    std::unique_lock lock(mutex_);
    room_.resize(bytes * static_cast<size_t>(size_));
    std::memcpy(room_.data() + bytes * static_cast<size_t>(rank), send, bytes);
    wait(lock);
    std::memcpy(receive, room_.data(), room_.size());
    wait(lock);
  }

 private:
  void wait(std::unique_lock<std::mutex>& lock) {
    const int round = round_;
    if (++arrived_ == size_) {
      arrived_ = 0;
      ++round_;
      all_here_.notify_all();
      return;
    }
    all_here_.wait(lock, [&] { return round_ != round; });
  }

  int size_;
  int arrived_ = 0;
  int round_ = 0;
  std::vector<char> room_;
  std::mutex mutex_;
  std::condition_variable all_here_;
};

struct Seat {
  Meeting* meeting;
  int rank;
};

int gather_at(void* context, const void* send, void* receive, size_t bytes) {
  const Seat* seat = static_cast<Seat*>(context);
  seat->meeting->all_gather(seat->rank, send, receive, bytes);
  return 0;
}

void require(int status) {
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
      require(pt_cuda_fusion_open(&config, gather_at, &seats_[rank], &channels_[rank]));
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
  void fuse(const std::vector<const Tensors*>& ranks, int algorithm) {
    const auto one = [&](size_t rank) {
      const pt_cuda_fusion_arguments arguments = ranks[rank]->arguments(algorithm);
      require(pt_cuda_fusion_fuse(channels_[rank], &arguments, streams_[rank]));
    };
    if (algorithm == PT_FUSION_NCCL) return together(one);
    for (size_t rank = 0; rank < channels_.size(); ++rank) one(rank);
  }

  // A graph of one call with a branch for each rank.
  cudaGraphExec_t capture(const std::vector<const Tensors*>& ranks, int algorithm) {
    GPU(cudaStreamBeginCapture(streams_[0], cudaStreamCaptureModeThreadLocal));
    GPU(cudaEventRecord(fork_, streams_[0]));
    for (size_t rank = 1; rank < streams_.size(); ++rank) GPU(cudaStreamWaitEvent(streams_[rank], fork_, 0));
    fuse(ranks, algorithm);
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

struct Case {
  Case(int size, uint64_t tokens, uint64_t hidden, bool with_norm) : norm(with_norm) {
    for (int rank = 0; rank < size; ++rank) {
      owned.push_back(std::make_unique<Tensors>(rank, tokens, hidden, norm));
      ranks.push_back(owned.back().get());
    }
  }
  bool norm;
  std::vector<std::unique_ptr<Tensors>> owned;
  std::vector<const Tensors*> ranks;
};

// Median over batches, per replay.
double microseconds(World& world, cudaGraphExec_t graph) {
  cudaEvent_t begin = nullptr, end = nullptr;
  GPU(cudaEventCreate(&begin));
  GPU(cudaEventCreate(&end));
  std::vector<double> batches;
  for (int batch = 0; batch < 12; ++batch) {
    constexpr int kReplays = 50;
    GPU(cudaEventRecord(begin, world.first_stream()));
    for (int replay = 0; replay < kReplays; ++replay) GPU(cudaGraphLaunch(graph, world.first_stream()));
    GPU(cudaEventRecord(end, world.first_stream()));
    GPU(cudaEventSynchronize(end));
    float milliseconds = 0;
    GPU(cudaEventElapsedTime(&milliseconds, begin, end));
    if (batch >= 2) batches.push_back(milliseconds * 1e3 / kReplays);
  }
  std::sort(batches.begin(), batches.end());
  GPU(cudaEventDestroy(begin));
  GPU(cudaEventDestroy(end));
  return batches[batches.size() / 2];
}

const char* const kNames[] = {"one-shot", "pull", "two-shot", "nccl"};

}  // namespace

bool same_everywhere(const std::vector<const Tensors*>& ranks, bool norm, uint64_t* hash) {
  const std::vector<uint16_t> expected = Tensors::expected(ranks);
  const std::vector<uint16_t> normed = norm ? ranks[0]->normed() : expected;
  for (const Tensors* rank : ranks) {
    if (rank->h() != expected || (norm && rank->normed() != normed)) return false;
  }
  *hash = fnv1a(expected.data(), expected.size() * 2) ^ fnv1a(normed.data(), normed.size() * 2);
  return true;
}

void check_streams(int size, int replays, bool nccl, Report& report) {
  World world(size, nccl);
  // Two graphs with different numbers of tokens in turn, and eager calls between them.
  Case small(size, 2, 4096, true), medium(size, 17, 4096, true), large(size, 61, 4096, true);
  const std::vector<int> algorithms = nccl ? std::vector<int>{PT_FUSION_NCCL}
                                           : std::vector<int>{PT_FUSION_ONE_SHOT, PT_FUSION_PULL, PT_FUSION_TWO_SHOT};
  for (const int algorithm : algorithms) {
    Case& second = algorithm == PT_FUSION_ONE_SHOT ? medium : large;  // inboxes of eight ranks hold 256 KiB
    world.fuse(small.ranks, algorithm);                               // kernels are loaded before anything is captured
    world.fuse(second.ranks, algorithm);
    world.finish();
    const bool graphs = algorithm != PT_FUSION_NCCL;  // whose ranks capture in threads of their own
    cudaGraphExec_t first = graphs ? world.capture(small.ranks, algorithm) : nullptr;
    cudaGraphExec_t other = graphs ? world.capture(second.ranks, algorithm) : nullptr;
    bool good = true;
    uint64_t hash = 0, hash_small = 0;
    for (int replay = 0; replay < replays && good; ++replay) {
      if (graphs && replay % 10 != 0) {
        GPU(cudaGraphLaunch(replay % 3 == 0 ? other : first, world.first_stream()));
      } else {
        // Streams do not know of the graph before: its end is waited for.
        GPU(cudaDeviceSynchronize());
        world.fuse(replay % 20 == 0 ? small.ranks : second.ranks, algorithm);
        GPU(cudaDeviceSynchronize());
      }
      if (replay % 1000 == 999 || replay + 1 == replays) {
        world.finish();
        good = same_everywhere(small.ranks, true, &hash_small) && same_everywhere(second.ranks, true, &hash);
      }
    }
    if (graphs) {
      GPU(cudaGraphExecDestroy(first));
      GPU(cudaGraphExecDestroy(other));
    }
    char line[256];
    std::snprintf(
        line, sizeof(line),
        R"({"check": "streams", "ranks": %d, "algorithm": "%s", "replays": %d, "hash": "%016llx", "good": %s})", size,
        kNames[algorithm], replays, static_cast<unsigned long long>(hash ^ hash_small), good ? "true" : "false");
    report.add(line, good);
  }
}

void measure(int size, Report& report) {
  World world(size, false);
  constexpr uint64_t kHidden = 4096;
  for (uint64_t tokens = 1; tokens * kHidden * 2 <= uint64_t{64} << 20; tokens *= 4) {
    for (const bool norm : {false, true}) {
      Case one(size, tokens, kHidden, norm);
      for (const int algorithm : {PT_FUSION_ONE_SHOT, PT_FUSION_PULL, PT_FUSION_TWO_SHOT}) {
        const uint64_t bytes = tokens * kHidden * 2;
        if (algorithm == PT_FUSION_ONE_SHOT && bytes > uint64_t{256} << 10) continue;
        world.fuse(one.ranks, algorithm);
        world.finish();
        cudaGraphExec_t graph = world.capture(one.ranks, algorithm);
        const double us = microseconds(world, graph);
        world.finish();
        GPU(cudaGraphExecDestroy(graph));
        char line[256];
        std::snprintf(line, sizeof(line),
                      R"({"measure": "fuse", "ranks": %d, "algorithm": "%s", "bytes": %llu, "norm": %s, "us": %.2f})",
                      size, kNames[algorithm], static_cast<unsigned long long>(bytes), norm ? "true" : "false", us);
        report.add(line);
      }
    }
  }
}

}  // namespace pt::gpu_check
