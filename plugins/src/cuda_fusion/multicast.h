// SPDX-License-Identifier: Apache-2.0
// Memory that the NVLink switch treats as one: a replica on the GPU of each rank, and an address of all of them, for
// multimem instructions. Beside the workspaces, and however these are shared.
#pragma once

#include "cuda_fusion/backend.h"
#include "cuda_fusion/virtual_memory.h"

namespace pt::cuda_fusion {

class Multicast {
 public:
  // Collective; the caller has made `device` current. Throws on all ranks where one of them has no multicast memory.
  Multicast(const Settings& settings, int device, const Exchange& exchange);
  Multicast(const Multicast&) = delete;
  Multicast& operator=(const Multicast&) = delete;

  Vector* replica() const { return reinterpret_cast<Vector*>(replica_.address()); }
  void* address() const { return all_.address(); }
  // From here on only the replica is held; the destructor gives it back, when all ranks have come this far.
  void unmap() noexcept { all_.unmap(); }

 private:
  // A replica as a part of the multicast object.
  class Binding {
   public:
    Binding() = default;
    Binding(const Binding&) = delete;
    Binding& operator=(const Binding&) = delete;
    ~Binding();
    void bind(const Physical& object, const Physical& memory, size_t bytes, CUdevice device);

   private:
    CUmemGenericAllocationHandle object_ = 0;
    size_t bytes_ = 0;
    CUdevice device_ = 0;
  };

  size_t agree_on_bytes(const Settings& settings, int device, const Exchange& exchange);

  size_t granularity_ = 0;
  // Let go of in the reverse order.
  Physical object_;
  Physical memory_;
  Binding binding_;
  Mapping replica_;
  Mapping all_;
};

}  // namespace pt::cuda_fusion
