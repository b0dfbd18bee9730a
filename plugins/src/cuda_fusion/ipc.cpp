// SPDX-License-Identifier: Apache-2.0
// Ranks as processes of one host: cudaIpc handles of whole cudaMalloc allocations.
#include <unistd.h>

#include "cuda_fusion/cuda_check.h"
#include "cuda_fusion/providers.h"

namespace pt::cuda_fusion {
namespace {

struct Place {
  cudaIpcMemHandle_t handle;
  pid_t pid;
};

class Ipc : public PeerMemory {
 public:
  Ipc(const Settings& settings, const Exchange& exchange) : rank_(settings.rank), size_(settings.common.size) {
    Place mine = {};
    mine.pid = ::getpid();
    exchange.together([&] {
      own_ = device_allocate<unsigned char>(settings.common.layout.total(), "the workspace");
      PT_CUDA(cudaIpcGetMemHandle(&mine.handle, own_.get()));
    });
    table_[rank_] = own_.get();
    const std::vector<Place> places = exchange.all_gather(mine);
    try {
      exchange.together([&] {
        for (int rank = 0; rank < size_; ++rank) {
          if (rank == rank_) continue;
          PT_FUSION_REQUIRE(places[rank].pid != mine.pid,
                            "open: ranks %d and %d share process %d, which cannot open its own handles; use the "
                            "provider for one process",
                            rank, rank_, mine.pid);
          void* address = nullptr;
          PT_CUDA(cudaIpcOpenMemHandle(&address, places[rank].handle, cudaIpcMemLazyEnablePeerAccess));
          table_[rank] = static_cast<unsigned char*>(address);
        }
      });
    } catch (...) {
      unmap_peers();
      throw;
    }
  }
  ~Ipc() override { unmap_peers(); }

  void unmap_peers() noexcept override {
    for (int rank = 0; rank < size_; ++rank) {
      if (rank == rank_ || table_[rank] == nullptr) continue;
      cudaIpcCloseMemHandle(table_[rank]);
      table_[rank] = nullptr;
    }
  }

 private:
  int rank_;
  int size_;
  DevicePointer<unsigned char> own_;
};

}  // namespace

std::unique_ptr<PeerMemory> open_ipc(const Settings& settings, const Exchange& exchange) {
  return std::make_unique<Ipc>(settings, exchange);
}

}  // namespace pt::cuda_fusion
