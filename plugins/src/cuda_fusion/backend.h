// SPDX-License-Identifier: Apache-2.0
// Where the memory of a channel is and what runs its protocols.
#pragma once

#include <memory>

#include "cuda_fusion/exchange.h"
#include "cuda_fusion/plan.h"

namespace pt::cuda_fusion {

// One rank's memory and the table of where it finds everybody's.
class PeerMemory {
 public:
  PeerMemory() = default;
  PeerMemory(const PeerMemory&) = delete;
  PeerMemory& operator=(const PeerMemory&) = delete;
  virtual ~PeerMemory() = default;

  // Of all ranks, own included.
  unsigned char* of(int rank) const { return table_[rank]; }
  // From here on only the own memory is used; it is freed by the destructor, when all ranks have come this far.
  virtual void unmap_peers() noexcept = 0;

 protected:
  unsigned char* table_[kMaxRanks] = {};
};

class Backend {
 public:
  Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;
  virtual ~Backend() = default;

  virtual const Record& record() const = 0;
  virtual bool has_nccl() const = 0;
  virtual void launch(const Plan& plan, int dtype, void* stream) = 0;
  // Ends the waits of this rank, and those of its peers.
  virtual void abort() = 0;
  // Waits for what was launched, then lets go of the peers' memory.
  virtual void unmap_peers() = 0;
};

// With defaults filled in. The same on all ranks but for `rank` and `device`.
struct Settings {
  int rank;
  int device;
  struct Common {
    int size;
    int provider;
    uint32_t num_blocks;
    Limits limits;
    Layout layout;
    double timeout_s;
    bool use_nccl;
    bool strict_order;
    bool use_nvls;
  } common;
};

// Collective.
std::unique_ptr<Backend> make_host_backend(const Settings& settings, const Exchange& exchange);
std::unique_ptr<Backend> make_cuda_backend(const Settings& settings, const Exchange& exchange);

// The part of a channel that does not depend on the backend.
Channel make_channel(const Settings& settings, const PeerMemory& memory, Control* control, Record* record);

}  // namespace pt::cuda_fusion
