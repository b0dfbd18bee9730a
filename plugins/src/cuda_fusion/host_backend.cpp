// SPDX-License-Identifier: Apache-2.0
// Ranks as threads of one process, on host memory: each call runs the device's protocol on the calling thread.
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "codecs/layout.h"
#include "cuda_fusion/backend.h"
#include "cuda_fusion/host_coder.h"
#include "cuda_fusion/host_multimem.h"
#include "cuda_fusion/host_team.h"
#include "cuda_fusion/nvls.h"
#include "cuda_fusion/one_shot.h"
#include "cuda_fusion/pull.h"
#include "cuda_fusion/two_shot.h"
#include "cuda_fusion/workspace.h"

namespace pt::cuda_fusion {
namespace {

class HostMemoryOfPeers : public PeerMemory {
 public:
  HostMemoryOfPeers(const Settings& settings, const Exchange& exchange)
      : own_(
            static_cast<unsigned char*>(::operator new(settings.common.layout.total(), std::align_val_t{kLineBytes}))) {
    const Layout& layout = settings.common.layout;
    fill_head(reinterpret_cast<std::byte*>(own_), layout, static_cast<uint32_t>(settings.rank));
    auto* inboxes = reinterpret_cast<Vector*>(own_ + Layout::inboxes());
    for (uint64_t i = 0; i < layout.inbox_vectors(); ++i) inboxes[i] = filled(kSentinel);
    struct Place {
      unsigned char* address;
      pid_t pid;
    };
    try {
      const std::vector<Place> places = exchange.all_gather(Place{own_, ::getpid()});
      exchange.together([&] {
        for (size_t rank = 0; rank < places.size(); ++rank) {
          PT_FUSION_REQUIRE(places[rank].pid == ::getpid(),
                            "open: rank %zu is in process %d, this one in %d; host threads share one process", rank,
                            places[rank].pid, ::getpid());
          table_[rank] = places[rank].address;
        }
      });
    } catch (...) {
      release();
      throw;
    }
  }
  ~HostMemoryOfPeers() override { release(); }
  void unmap_peers() noexcept override {}

 private:
  void release() { ::operator delete(own_, std::align_val_t{kLineBytes}); }

  unsigned char* own_;
};

// Stands for multicast memory.
class HostMulticast {
 public:
  HostMulticast(const Settings& settings, const Exchange& exchange) {
    exchange.together([&] { own_.resize(settings.common.layout.staging_bytes / sizeof(Vector)); });
    const std::vector<Vector*> replicas = exchange.all_gather(own_.data());
    std::copy(replicas.begin(), replicas.end(), replicas_.of);
  }
  Vector* replica() { return own_.data(); }
  HostReplicas* address() { return &replicas_; }

 private:
  std::vector<Vector> own_;
  HostReplicas replicas_ = {};
};

class HostBackend : public Backend {
 public:
  HostBackend(const Settings& settings, const Exchange& exchange)
      : memory_(settings, exchange),
        control_(first_control()),
        channel_(make_channel(settings, memory_, &control_, &record_)) {
    if (!settings.common.use_nvls) return;
    multicast_ = std::make_unique<HostMulticast>(settings, exchange);
    channel_.replica = multicast_->replica();
    channel_.multicast = multicast_->address();
  }

  const Record& record() const override { return record_; }
  bool has_nccl() const override { return false; }
  void unmap_peers() override {}

  void launch(const Plan& plan, int dtype, void*) override {
    switch (dtype) {
      case PT_BFLOAT16:
        return run<numeric::Bfloat16>(plan);
      case PT_FLOAT16:
        return run<numeric::Float16>(plan);
      default:
        return run<numeric::Float32>(plan);
    }
  }

  void abort() override {
    HostMemory::store_relaxed(&record_.abort_request, 1u);
    for (uint32_t peer = 0; peer < channel_.size; ++peer) {
      HostMemory::store_relaxed(&channel_.header(peer)->abort, channel_.rank + 1);
    }
  }

 private:
  template <typename Type>
  void run(const Plan& plan) {
    HostBlock block(1);
    HostTeam team(block, 0, 0, 1);
    if (plan.algorithm == Algorithm::kNvls) return Nvls<HostMemory, HostMultimem, Type>::run(channel_, plan.call, team);
    if (plan.codec == PT_CODEC_NONE) return run<Plain<Type>>(plan, team);
    codecs::with_codec(plan.codec, [&](auto codec) { run<Coded<HostCoder<decltype(codec)>, Type>>(plan, team); });
  }

  template <typename Payload>
  void run(const Plan& plan, HostTeam& team) {
    switch (plan.algorithm) {
      case Algorithm::kOneShot:
        return OneShot<HostMemory, Payload, 0>::run(channel_, plan.call, team);
      case Algorithm::kPull:
        return Pull<HostMemory, Payload>::run(channel_, plan.call, team);
      case Algorithm::kTwoShot:
        return TwoShot<HostMemory, Payload, 0>::run(channel_, plan.call, team);
      default:
        throw Error(PT_INTERNAL, "cuda_fusion: nccl was chosen for host memory");
    }
  }

  HostMemoryOfPeers memory_;
  std::unique_ptr<HostMulticast> multicast_;
  Control control_;
  Record record_ = {};
  Channel channel_;
};

}  // namespace

std::unique_ptr<Backend> make_host_backend(const Settings& settings, const Exchange& exchange) {
  return std::make_unique<HostBackend>(settings, exchange);
}

}  // namespace pt::cuda_fusion
