// SPDX-License-Identifier: Apache-2.0
#include "codec_cases.h"
#include "kernel_cases.h"

int main() {
#if defined(PT_HAVE_X86_KERNELS)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    pt::testing::check_same_bits(pt::track_fusion::baseline::kKernels, pt::track_fusion::avx512::kKernels);
    pt::testing::check_same_codec_bits(pt::codecs::baseline::kKernels, pt::codecs::avx512::kKernels);
    return 0;
  }
#endif
  std::puts("skipped: this processor has no AVX-512 (F, BW, VL, DQ)");
  return pt::testing::kSkip;
}
