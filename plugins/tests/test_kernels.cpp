// SPDX-License-Identifier: Apache-2.0
// The arithmetic: conversions against the compiler's own half type, baseline against AVX2.
#include <cmath>

#include "kernel_cases.h"

using namespace pt;
using track_fusion::Kernels;

namespace {

// All 65536 halves survive a sum over one rank; NaN becomes the one NaN.
void check_sixteen_bit_round_trip(const Kernels& kernels, int dtype) {
  std::vector<uint16_t> all(65536), out(65536);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
  const void* sources[] = {all.data()};
  kernels.reduce[dtype](sources, 1, nullptr, 1.0f, out.data(), all.size());
  const uint16_t infinity = dtype == PT_FLOAT16 ? 0x7C00 : 0x7F80;
  const uint16_t nan = dtype == PT_FLOAT16 ? 0x7E00 : 0x7FC0;
  for (size_t i = 0; i < all.size(); ++i) CHECK(out[i] == ((all[i] & 0x7FFF) > infinity ? nan : all[i]));
}

// Sums of two halves against the exact sum (a double) rounded by the compiler.
void check_half_rounding(const Kernels& kernels) {
#if defined(__FLT16_MAX__)
  std::mt19937 random(3);
  std::vector<uint16_t> a(20000), b(20000), out(20000);
  for (size_t i = 0; i < a.size(); ++i) {
    a[i] = static_cast<uint16_t>(random() % 0x7C00) | (random() % 2 ? 0x8000 : 0);
    b[i] = static_cast<uint16_t>(random() % 0x7C00) | (random() % 2 ? 0x8000 : 0);
  }
  const void* sources[] = {a.data(), b.data()};
  kernels.reduce[PT_FLOAT16](sources, 2, nullptr, 1.0f, out.data(), a.size());
  for (size_t i = 0; i < a.size(); ++i) {
    const float sum =
        static_cast<float>(__builtin_bit_cast(_Float16, a[i])) + static_cast<float>(__builtin_bit_cast(_Float16, b[i]));
    CHECK(out[i] == __builtin_bit_cast(uint16_t, static_cast<_Float16>(sum)));
  }
#else
  static_cast<void>(kernels);
#endif
}

void check_norm_of_known_row(const Kernels& kernels) {
  const float h[] = {3.0f, 4.0f}, gamma[] = {1.0f, 2.0f};
  float out[2];
  kernels.rms_norm[PT_FLOAT32][1](h, gamma, 1, 0.0f, out, 2, 1, 2);
  const float inverse = 1.0f / std::sqrt(12.5f);
  CHECK(out[0] == (3.0f * inverse) * 1.0f && out[1] == (4.0f * inverse) * 2.0f);
}

void check_table(const Kernels& kernels) {
  check_sixteen_bit_round_trip(kernels, PT_BFLOAT16);
  check_sixteen_bit_round_trip(kernels, PT_FLOAT16);
  check_half_rounding(kernels);
  check_norm_of_known_row(kernels);
}

}  // namespace

int main() {
  check_table(track_fusion::baseline::kKernels);
#if defined(PT_HAVE_X86_KERNELS)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("f16c")) {
    std::puts("skipped the AVX2 half: this processor has no AVX2");
    return testing::kSkip;
  }
  check_table(track_fusion::avx2::kKernels);
  testing::check_same_bits(track_fusion::baseline::kKernels, track_fusion::avx2::kKernels);
#endif
}
