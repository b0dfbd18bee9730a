// SPDX-License-Identifier: Apache-2.0
// NVLS needs a GPU for each rank and multicast memory on all of them: one GPU cannot try it.
#include <cmath>
#include <memory>

#include "common/error.h"
#include "cuda_fusion/driver.h"
#include "gpu_check/world.h"

namespace pt::gpu_check {
namespace {

constexpr uint64_t kHidden = 4096;

// Why nothing can be run on the first `count` devices, or nothing.
std::string obstacle(int count) {
  if (count < 2) return "not run: one device";
  try {
    const auto& driver = cuda_fusion::MulticastDriver::get();
    for (int ordinal = 0; ordinal < count; ++ordinal) {
      CUdevice device = 0;
      int supported = 0;
      const bool known = driver.device(&device, ordinal) == CUDA_SUCCESS &&
                         driver.attribute(&supported, CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED, device) == CUDA_SUCCESS;
      if (!known || supported == 0) return "not run: device " + std::to_string(ordinal) + " has no multicast memory";
    }
  } catch (const Error& error) {
    return std::string("not run: ") + error.what();
  }
  return "";
}

// One rank, on the device of its number.
class Rank {
 public:
  Rank(Meeting& meeting, int rank, int size)
      : seat_{&meeting, rank}, small_(rank, 3, kHidden, true), large_(rank, 1000, kHidden, true) {
    pt_cuda_fusion_config config = {};
    config.struct_bytes = sizeof(config);
    config.size = size;
    config.rank = rank;
    config.provider = PT_FUSION_SAME_PROCESS;
    config.device = rank;
    config.staging_bytes = uint64_t{4} << 20;  // the large message goes in two pieces
    config.timeout_s = 5.0;
    config.use_nvls = 1;
    require(pt_cuda_fusion_open(&config, gather, &seat_, &channel_));
    GPU(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  Rank(const Rank&) = delete;
  Rank& operator=(const Rank&) = delete;
  ~Rank() {
    require(pt_cuda_fusion_close(channel_));
    cudaStreamDestroy(stream_);
  }

  const Tensors& small() const { return small_; }
  const Tensors& large() const { return large_; }

  void fuse(const Tensors& tensors) const {
    const pt_cuda_fusion_arguments arguments = tensors.arguments(PT_FUSION_NVLS);
    require(pt_cuda_fusion_fuse(channel_, &arguments, stream_));
  }
  void finish() const {
    GPU(cudaStreamSynchronize(stream_));
    require(pt_cuda_fusion_status(channel_));
  }
  // Replays of a graph of both messages, with eager calls between them.
  void replay(int calls) const {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    GPU(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    fuse(small_);
    fuse(large_);
    GPU(cudaStreamEndCapture(stream_, &graph));
    GPU(cudaGraphInstantiate(&executable, graph, 0));
    for (int call = 0; call < calls; ++call) {
      GPU(cudaGraphLaunch(executable, stream_));
      if (call % 7 == 0) fuse(call % 2 == 0 ? small_ : large_);
    }
    finish();
    GPU(cudaGraphExecDestroy(executable));
    GPU(cudaGraphDestroy(graph));
  }

 private:
  Seat seat_;
  Tensors small_;
  Tensors large_;
  pt_cuda_fusion* channel_ = nullptr;
  cudaStream_t stream_ = nullptr;
};

// The same bits on all ranks, and near the contract's mean: the switch may truncate, and adds in any order.
bool plausible(const std::vector<const Tensors*>& ranks) {
  const std::vector<uint16_t> expected = Tensors::expected(ranks, PT_FUSION_NVLS, PT_CODEC_NONE);
  const std::vector<float> sizes = Tensors::mean_sizes(ranks);
  const std::vector<uint16_t> h = ranks[0]->h(), normed = ranks[0]->normed();
  for (const Tensors* rank : ranks) {
    if (rank->h() != h || rank->normed() != normed) return false;
  }
  for (size_t i = 0; i < h.size(); ++i) {
    const float difference = numeric::Bfloat16::to_float(h[i]) - numeric::Bfloat16::to_float(expected[i]);
    if (!(std::abs(difference) <= sizes[i] / 64)) return false;
  }
  return true;
}

void check_size(int size, int calls, Report& report) {
  Meeting meeting(size);
  std::vector<std::unique_ptr<Rank>> ranks(static_cast<size_t>(size));
  const auto together = [&](const auto& body) {
    std::vector<std::thread> threads;
    for (int rank = 0; rank < size; ++rank) {
      threads.emplace_back([&, rank] {
        GPU(cudaSetDevice(rank));
        body(ranks[static_cast<size_t>(rank)], rank);
      });
    }
    for (std::thread& thread : threads) thread.join();
  };
  together([&](auto& rank, int number) { rank = std::make_unique<Rank>(meeting, number, size); });
  const auto tensors = [&](const auto& choose) {
    std::vector<const Tensors*> chosen;
    for (const auto& rank : ranks) chosen.push_back(&choose(*rank));
    return chosen;
  };
  const auto small = tensors([](const Rank& rank) -> const Tensors& { return rank.small(); });
  const auto large = tensors([](const Rank& rank) -> const Tensors& { return rank.large(); });
  together([](auto& rank, int) {
    rank->fuse(rank->small());
    rank->fuse(rank->large());
    rank->finish();
  });
  const std::vector<uint16_t> first = large[0]->h();
  bool good = plausible(small) && plausible(large);
  together([&](auto& rank, int) { rank->replay(calls); });
  good = good && plausible(small) && plausible(large);
  const bool same = large[0]->h() == first;
  together([](auto& rank, int) { rank.reset(); });
  char line[256];
  std::snprintf(line, sizeof(line),
                R"({"check": "nvls", "ranks": %d, "calls": %d, "same_bits_in_first_and_last_call": %s, "good": %s})",
                size, calls, same ? "true" : "false", good ? "true" : "false");
  report.add(line, good);
}

}  // namespace

void check_nvls(int calls, Report& report) {
  int devices = 0;
  GPU(cudaGetDeviceCount(&devices));
  const std::string text = obstacle(devices);
  if (!text.empty()) return report.add(R"({"note": "NVLS", "text": ")" + text + R"("})");
  for (const int size : {2, 4, 8}) {
    if (size <= devices) check_size(size, calls, report);
  }
}

}  // namespace pt::gpu_check
