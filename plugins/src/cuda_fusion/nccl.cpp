// SPDX-License-Identifier: Apache-2.0
#include "cuda_fusion/nccl.h"

#include <dlfcn.h>

#include <algorithm>

#include "cuda_fusion/cuda_check.h"

namespace pt::cuda_fusion {
namespace {

// NCCL's ABI, as its public header states it.
struct UniqueId {
  char internal[128];
};
constexpr int kBytes = 0;             // ncclInt8
constexpr uint64_t kSliceAlign = 64;  // elements: slices start on 16 bytes whatever their type

struct Library {
  int (*get_unique_id)(UniqueId*);
  int (*comm_init_rank)(void**, int, UniqueId, int);
  int (*comm_destroy)(void*);
  int (*group_start)();
  int (*group_end)();
  int (*send)(const void*, size_t, int, int, void*, cudaStream_t);
  int (*receive)(void*, size_t, int, int, void*, cudaStream_t);
  const char* (*get_error_string)(int);
};

template <typename Function>
bool look_up(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(::dlsym(library, name));
  return function != nullptr;
}

// Null when it is missing or older than its point-to-point calls.
const Library* library() noexcept {
  static const Library* const found = []() -> const Library* {
    void* handle = ::dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    static Library calls = {};
    const bool complete = handle != nullptr && look_up(handle, "ncclGetUniqueId", calls.get_unique_id) &&
                          look_up(handle, "ncclCommInitRank", calls.comm_init_rank) &&
                          look_up(handle, "ncclCommDestroy", calls.comm_destroy) &&
                          look_up(handle, "ncclGroupStart", calls.group_start) &&
                          look_up(handle, "ncclGroupEnd", calls.group_end) && look_up(handle, "ncclSend", calls.send) &&
                          look_up(handle, "ncclRecv", calls.receive) &&
                          look_up(handle, "ncclGetErrorString", calls.get_error_string);
    return complete ? &calls : nullptr;
  }();
  return found;
}

void check(int result, const char* what) {
  if (result == 0) return;
  throw Error(PT_SYSTEM_ERROR, format_text("cuda_fusion: %s: %s", what, library()->get_error_string(result)));
}

}  // namespace

bool nccl_found() noexcept { return library() != nullptr; }

Nccl::Nccl(int rank, int size, uint64_t scratch_bytes, const Exchange& exchange)
    : rank_(rank), size_(size), scratch_bytes_(scratch_bytes) {
  UniqueId id = {};
  exchange.together([&] {
    if (rank == 0) check(library()->get_unique_id(&id), "ncclGetUniqueId");
  });
  id = exchange.all_gather(id)[0];
  DevicePointer<unsigned char> scratch;
  exchange.together([&] {
    // Slices of everybody, and the sum.
    scratch = device_allocate<unsigned char>(2 * scratch_bytes, "NCCL's slices");
    check(library()->comm_init_rank(&communicator_, size, id, rank), "ncclCommInitRank");
  });
  scratch_ = scratch.release();
}

Nccl::~Nccl() {
  library()->comm_destroy(communicator_);
  cudaFree(scratch_);
}

void Nccl::launch(const Plan& plan, int dtype, cudaStream_t stream) const {
  const uint64_t piece = scratch_bytes_ / dtype_bytes(dtype) / (kSliceAlign * size_) * (kSliceAlign * size_);
  for (uint64_t first = 0; first < plan.call.elements; first += piece) {
    exchange_slices(plan.call, dtype, first, std::min(piece, plan.call.elements - first), stream);
  }
  if (plan.call.num_gammas != 0) PT_CUDA(launch_norm(plan, dtype, stream));
}

void Nccl::exchange_slices(const Call& call, int dtype, uint64_t first, uint64_t count, cudaStream_t stream) const {
  const Library& nccl = *library();
  const uint64_t bytes = dtype_bytes(dtype);
  const uint64_t per_rank = (count + size_ - 1) / size_;
  const uint64_t slice = (per_rank + kSliceAlign - 1) / kSliceAlign * kSliceAlign;
  const auto begin = [&](int rank) { return std::min(count, slice * static_cast<uint64_t>(rank)); };
  const auto slice_bytes = [&](int rank) { return (begin(rank + 1) - begin(rank)) * bytes; };
  const auto* x = static_cast<const unsigned char*>(call.x) + first * bytes;
  auto* h = static_cast<unsigned char*>(call.h) + first * bytes;
  unsigned char* const own_sum = scratch_ + scratch_bytes_;

  check(nccl.group_start(), "ncclGroupStart");
  for (int rank = 0; rank < size_; ++rank) {
    if (slice_bytes(rank) != 0) {
      check(nccl.send(x + begin(rank) * bytes, slice_bytes(rank), kBytes, rank, communicator_, stream), "ncclSend");
    }
    if (slice_bytes(rank_) != 0) {
      check(nccl.receive(scratch_ + static_cast<uint64_t>(rank) * slice * bytes, slice_bytes(rank_), kBytes, rank,
                         communicator_, stream),
            "ncclRecv");
    }
  }
  check(nccl.group_end(), "ncclGroupEnd");

  if (slice_bytes(rank_) != 0) {
    // Whole vectors: what lies behind the slice's end is scratch memory.
    SliceSum sum = {};
    for (int rank = 0; rank < size_; ++rank) sum.sources[rank] = scratch_ + static_cast<uint64_t>(rank) * slice * bytes;
    sum.size = static_cast<uint32_t>(size_);
    sum.out = own_sum;
    sum.count = (slice_bytes(rank_) / bytes + kSliceAlign - 1) / kSliceAlign * kSliceAlign;
    sum.scale = call.scale;
    PT_CUDA(launch_slice_sum(sum, dtype, stream));
  }

  check(nccl.group_start(), "ncclGroupStart");
  for (int rank = 0; rank < size_; ++rank) {
    if (slice_bytes(rank_) != 0) {
      check(nccl.send(own_sum, slice_bytes(rank_), kBytes, rank, communicator_, stream), "ncclSend");
    }
    if (slice_bytes(rank) != 0) {
      check(nccl.receive(h + begin(rank) * bytes, slice_bytes(rank), kBytes, rank, communicator_, stream), "ncclRecv");
    }
  }
  check(nccl.group_end(), "ncclGroupEnd");
}

}  // namespace pt::cuda_fusion
