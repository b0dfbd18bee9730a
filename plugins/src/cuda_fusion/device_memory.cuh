// SPDX-License-Identifier: Apache-2.0
// The memory model of the device. Peers are other devices: everything they see is of system scope.
#pragma once

#include <stdint.h>

#include "cuda_fusion/vector.h"

namespace pt::cuda_fusion {
namespace {

struct DeviceMemory {
  static constexpr uint32_t kPollsPerCheck = 1024;

  // A vector is four relaxed accesses to PTX, in one instruction.
  static __device__ __forceinline__ Vector load_relaxed(const Vector* from) {
    Vector v;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(__cvta_generic_to_global(from))
                 : "memory");
    return v;
  }
  static __device__ __forceinline__ void store_relaxed(Vector* to, const Vector& v) {
    asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
                 : "memory");
  }
  static __device__ __forceinline__ Pair load_relaxed(const Pair* from) {
    Pair v;
    asm volatile("ld.relaxed.sys.global.v2.u32 {%0, %1}, [%2];"
                 : "=r"(v.word[0]), "=r"(v.word[1])
                 : "l"(__cvta_generic_to_global(from))
                 : "memory");
    return v;
  }
  static __device__ __forceinline__ void store_relaxed(Pair* to, const Pair& v) {
    asm volatile("st.relaxed.sys.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(v.word[0]),
                 "r"(v.word[1])
                 : "memory");
  }
  static __device__ __forceinline__ uint32_t load_relaxed(const uint32_t* from) {
    uint32_t value;
    asm volatile("ld.relaxed.sys.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
  }
  static __device__ __forceinline__ void store_relaxed(uint32_t* to, uint32_t value) {
    asm volatile("st.relaxed.sys.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
  }
  static __device__ __forceinline__ uint32_t load_acquire(const uint32_t* from) {
    uint32_t value;
    asm volatile("ld.acquire.sys.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
  }
  static __device__ __forceinline__ void store_release(uint32_t* to, uint32_t value) {
    asm volatile("st.release.sys.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
  }
  // Only blocks of this kernel count: device scope.
  static __device__ __forceinline__ uint32_t arrive(uint32_t* counter) {
    uint32_t before;
    asm volatile("atom.add.acq_rel.gpu.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
  }
  static __device__ __forceinline__ bool claim(uint32_t* word) { return atomicExch(word, 1u) == 0; }
  static __device__ __forceinline__ void fence() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
  static __device__ __forceinline__ void pause() {}
  static __device__ __forceinline__ uint64_t now_ns() {
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
  }
};

// The threads of a block. The shape of a sum depends on the number of threads only.
class DeviceTeam {
 public:
  __device__ DeviceTeam(uint32_t block, uint32_t num_blocks) : block_(block), num_blocks_(num_blocks) {}

  __device__ __forceinline__ uint32_t thread() const { return threadIdx.x; }
  __device__ __forceinline__ uint32_t size() const { return blockDim.x; }
  __device__ __forceinline__ uint32_t block() const { return block_; }
  __device__ __forceinline__ uint32_t num_blocks() const { return num_blocks_; }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ bool all(bool value) const { return __syncthreads_and(value) != 0; }

  __device__ __forceinline__ float sum(float value) {
    // Two buffers in turn: a slow warp may still read one while a fast one writes the next.
    __shared__ float partial[2][32];
    const uint32_t lane = threadIdx.x % 32;
    turn_ ^= 1u;
    for (int distance = 16; distance > 0; distance /= 2) {
      value = __fadd_rn(value, __shfl_xor_sync(0xFFFFFFFFu, value, distance));
    }
    if (lane == 0) partial[turn_][threadIdx.x / 32] = value;
    __syncthreads();
    float total = lane < blockDim.x / 32 ? partial[turn_][lane] : 0.0f;
    for (int distance = 16; distance > 0; distance /= 2) {
      total = __fadd_rn(total, __shfl_xor_sync(0xFFFFFFFFu, total, distance));
    }
    return total;
  }

 private:
  uint32_t block_;
  uint32_t num_blocks_;
  uint32_t turn_ = 0;
};

}  // namespace
}  // namespace pt::cuda_fusion
