// SPDX-License-Identifier: Apache-2.0
#include "linear_cases.h"

int main() {
#if defined(PT_HAVE_X86_KERNELS)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    pt::testing::check_table(pt::linear::avx512::kKernels);
    return 0;
  }
#endif
  std::puts("skipped: this processor has no AVX-512 (F, BW, VL, DQ)");
  return pt::testing::kSkip;
}
