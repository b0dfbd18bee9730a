// SPDX-License-Identifier: Apache-2.0
#include "common/isa.h"

namespace pt {

bool isa_runs_here(const char* isa) noexcept {
#if defined(__x86_64__)
  // What -march=x86-64-v3 and -v4 let the compiler use.
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("lzcnt");
  if (std::strcmp(isa, "avx2") == 0) return v3;
  if (std::strcmp(isa, "avx512") == 0) {
    return v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  }
#endif
  return std::strcmp(isa, "baseline") == 0;
}

}  // namespace pt
