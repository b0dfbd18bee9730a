// SPDX-License-Identifier: Apache-2.0
// Ranks with GPUs: workspaces in device memory, protocols as kernels.
#include <algorithm>

#include "cuda_fusion/cuda_check.h"
#include "cuda_fusion/launch.h"
#include "cuda_fusion/multicast.h"
#include "cuda_fusion/nccl.h"
#include "cuda_fusion/providers.h"
#include "cuda_fusion/workspace.h"

namespace pt::cuda_fusion {
namespace {

struct FreePinned {
  void operator()(void* memory) const { cudaFreeHost(memory); }
};

int device_of(const Settings& settings) {
  if (settings.device >= 0) return settings.device;
  int current = 0;
  PT_CUDA(cudaGetDevice(&current));
  return current;
}

std::unique_ptr<PeerMemory> open_memory(const Settings& settings, const Exchange& exchange) {
  switch (settings.common.provider) {
    case PT_FUSION_CUDA_IPC:
      return open_ipc(settings, exchange);
    case PT_FUSION_VMM:
      return open_vmm(settings, exchange);
    default:
      return open_same_process(settings, exchange);
  }
}

class CudaBackend : public Backend {
 public:
  CudaBackend(const Settings& settings, const Exchange& exchange) : settings_(settings) {
    exchange.together([&] {
      device_ = device_of(settings);
      const DeviceScope scope(device_);
      check_device();
      void* record = nullptr;
      PT_CUDA(cudaHostAlloc(&record, sizeof(Record), cudaHostAllocMapped | cudaHostAllocPortable));
      record_.reset(new (record) Record{});
      control_ = device_allocate<Control>(sizeof(Control), "the counters");
      PT_CUDA(cudaStreamCreateWithFlags(&private_stream_, cudaStreamNonBlocking));
    });
    const DeviceScope scope(device_);
    memory_ = open_memory(settings, exchange);
    exchange.together([&] { prepare(); });
    probe(exchange);
    if (settings.common.use_nvls) open_multicast(exchange);
    const std::vector<char> found = exchange.all_gather(static_cast<char>(settings.common.use_nccl && nccl_found()));
    if (settings.common.size > 1 && std::all_of(found.begin(), found.end(), [](char has) { return has != 0; })) {
      nccl_ =
          std::make_unique<Nccl>(settings.rank, settings.common.size, settings.common.layout.staging_bytes, exchange);
    }
  }

  ~CudaBackend() override {
    if (private_stream_ != nullptr) cudaStreamDestroy(private_stream_);
  }

  const Record& record() const override { return *record_; }
  bool has_nccl() const override { return nccl_ != nullptr; }

  void launch(const Plan& plan, int dtype, void* stream) override {
    const DeviceScope scope(device_);
    auto* const on = static_cast<cudaStream_t>(stream);
    if (plan.algorithm == Algorithm::kNccl) return nccl_->launch(plan, dtype, on);
    // Blocks wait for blocks of the same number: the grid is that of all ranks. One-shot blocks wait for messages only.
    const uint32_t num_blocks =
        plan.algorithm == Algorithm::kOneShot
            ? static_cast<uint32_t>(std::min<uint64_t>(plan.call.rows, static_cast<uint64_t>(num_multiprocessors_)))
            : settings_.common.num_blocks;
    PT_CUDA(launch_protocol(channel_, plan, dtype, num_blocks, on));
  }

  void abort() override {
    const DeviceScope scope(device_);
    reinterpret_cast<volatile uint32_t&>(record_->abort_request) = 1;  // ends the waits of a kernel that runs
    PT_CUDA(launch_abort(channel_, private_stream_));
  }

  void unmap_peers() override {
    const DeviceScope scope(device_);
    const cudaError_t error = cudaDeviceSynchronize();
    nccl_.reset();
    if (multicast_ != nullptr) multicast_->unmap();
    memory_->unmap_peers();
    check_cuda(error, "waiting for the last kernels");
  }

 private:
  void check_device() {
    int major = 0, minor = 0, blocks = 0;
    PT_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_));
    PT_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_));
    PT_CUDA(cudaDeviceGetAttribute(&num_multiprocessors_, cudaDevAttrMultiProcessorCount, device_));
    if (major < 8) {
      throw Error(PT_UNSUPPORTED, format_text("cuda_fusion: open: device %d has compute capability %d.%d, expected 8.0 "
                                              "or newer",
                                              device_, major, minor));
    }
    PT_CUDA(resident_blocks(&blocks));  // also loads the kernels, which must not happen while a peer spins
    if (static_cast<uint32_t>(blocks * num_multiprocessors_) < settings_.common.num_blocks) {
      throw Error(PT_UNSUPPORTED, format_text("cuda_fusion: open: %u blocks must run at once, device %d holds %d",
                                              settings_.common.num_blocks, device_, blocks * num_multiprocessors_));
    }
  }

  void prepare() {
    std::vector<std::byte> head(Layout::inboxes());
    fill_head(head.data(), settings_.common.layout, static_cast<uint32_t>(settings_.rank));
    const Control control = first_control();
    void* record = nullptr;
    PT_CUDA(cudaHostGetDevicePointer(&record, record_.get(), 0));
    channel_ = make_channel(settings_, *memory_, control_.get(), static_cast<Record*>(record));
    unsigned char* const own = memory_->of(settings_.rank);
    PT_CUDA(cudaMemcpy(own, head.data(), head.size(), cudaMemcpyHostToDevice));
    PT_CUDA(cudaMemcpy(control_.get(), &control, sizeof(control), cudaMemcpyHostToDevice));
    PT_CUDA(launch_fill(reinterpret_cast<Vector*>(own + Layout::inboxes()), settings_.common.layout.inbox_vectors(),
                        private_stream_));
    PT_CUDA(cudaStreamSynchronize(private_stream_));
  }

  // Attributes promise peer access on machines where it does not work: write to every peer, and look.
  void probe(const Exchange& exchange) {
    exchange.together([&] {
      PT_CUDA(launch_probe(channel_, private_stream_));
      PT_CUDA(cudaStreamSynchronize(private_stream_));
    });
    exchange.together([&] {
      Header header = {};
      PT_CUDA(cudaMemcpy(&header, memory_->of(settings_.rank), sizeof(header), cudaMemcpyDeviceToHost));
      for (int peer = 0; peer < settings_.common.size; ++peer) {
        if (header.probe[peer] == kMagic + static_cast<uint32_t>(peer)) continue;
        throw Error(PT_UNSUPPORTED,
                    format_text("cuda_fusion: open: what rank %d wrote to the memory of rank %d did not "
                                "arrive; peer access does not work on this machine",
                                peer, settings_.rank));
      }
    });
  }

  void open_multicast(const Exchange& exchange) {
    exchange.together([&] {
      int target = 0;
      PT_CUDA(nvls_target(&target));
      if (target >= 90) return;
      throw Error(PT_UNSUPPORTED,
                  format_text("cuda_fusion: open: use_nvls is set, and this library's kernels for device "
                              "%d were compiled for sm_%d; expected a GPU of sm_90 or newer and its "
                              "target in PT_CUDA_ARCHITECTURES",
                              device_, target));
    });
    multicast_ = std::make_unique<Multicast>(settings_, device_, exchange);
    channel_.replica = multicast_->replica();
    channel_.multicast = multicast_->address();
    probe_multicast(exchange);
  }

  // Has the switch add and store a vector for every rank, and looks at what comes out.
  void probe_multicast(const Exchange& exchange) {
    const size_t bytes = (1 + channel_.size) * sizeof(Vector);
    std::vector<float> words(bytes / sizeof(float), -1.0f);
    exchange.together([&] {
      std::fill_n(words.begin(), 4, static_cast<float>(channel_.rank + 1));
      PT_CUDA(cudaMemcpy(channel_.replica, words.data(), bytes, cudaMemcpyHostToDevice));
    });
    exchange.together([&] {
      PT_CUDA(launch_multicast_probe(channel_, private_stream_));
      PT_CUDA(cudaStreamSynchronize(private_stream_));
    });
    exchange.together([&] {
      PT_CUDA(cudaMemcpy(words.data(), channel_.replica, bytes, cudaMemcpyDeviceToHost));
      const auto expected = static_cast<float>(channel_.size * (channel_.size + 1) / 2);
      for (size_t i = 4; i < words.size(); ++i) {
        if (words[i] == expected) continue;
        throw Error(PT_UNSUPPORTED, format_text("cuda_fusion: open: the switch gave rank %u the sum %g by way of rank "
                                                "%zu, expected %g; multicast memory does not work on this machine",
                                                channel_.rank, static_cast<double>(words[i]), i / 4 - 1,
                                                static_cast<double>(expected)));
      }
    });
  }

  Settings settings_;
  int device_ = 0;
  int num_multiprocessors_ = 0;
  cudaStream_t private_stream_ = nullptr;
  std::unique_ptr<Record, FreePinned> record_;
  DevicePointer<Control> control_;
  std::unique_ptr<PeerMemory> memory_;
  std::unique_ptr<Multicast> multicast_;
  std::unique_ptr<Nccl> nccl_;
  Channel channel_ = {};
};

}  // namespace

std::unique_ptr<Backend> make_cuda_backend(const Settings& settings, const Exchange& exchange) {
  return std::make_unique<CudaBackend>(settings, exchange);
}

}  // namespace pt::cuda_fusion
