// SPDX-License-Identifier: Apache-2.0
// Memory behind a multicast address: the NVLink switch reads or writes all replicas. Code for older targets traps; the
// host refuses to launch it.
#pragma once

#include <type_traits>

#include "cuda_fusion/call.h"

namespace pt::cuda_fusion {
namespace {

struct DeviceMultimem {
  template <typename Type>
  static __device__ __forceinline__ Vector sum(const Channel& channel, uint64_t at) {
    Vector v = {};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const size_t address = global(channel, at);
    if constexpr (std::is_same_v<Type, numeric::Bfloat16>) {
      asm volatile("multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                   : "l"(address)
                   : "memory");
    } else if constexpr (std::is_same_v<Type, numeric::Float16>) {
      asm volatile("multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.f16x2 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                   : "l"(address)
                   : "memory");
    } else {
      asm volatile("multimem.ld_reduce.relaxed.sys.global.add.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                   : "l"(address)
                   : "memory");
    }
#else
    __trap();
#endif
    return v;
  }

  static __device__ __forceinline__ void store(const Channel& channel, uint64_t at, const Vector& v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("multimem.st.relaxed.sys.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(global(channel, at)),
                 "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
                 : "memory");
#else
    __trap();
#endif
  }

  // Two addresses lead to the same memory: release and acquire order accesses through one of them only.
  static __device__ __forceinline__ void fence() { asm volatile("fence.proxy.alias;" ::: "memory"); }

 private:
  static __device__ __forceinline__ size_t global(const Channel& channel, uint64_t at) {
    return __cvta_generic_to_global(static_cast<Vector*>(channel.multicast) + at);
  }
};

}  // namespace
}  // namespace pt::cuda_fusion
