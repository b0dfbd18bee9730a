// SPDX-License-Identifier: Apache-2.0
// Weight-streaming products against float64, for every kind, odd sizes, 1 to 17 rows; bits across rows and threads.
#include "linear_cases.h"

using namespace pt::testing;

namespace {

void check_refusals() {
  const Case c = make_case(PT_LINEAR_INT4, 0, 5, 64, 32);
  float x[64] = {}, y[5];
  const auto status_of = [&](auto&& change, size_t rows, int dtype, int threads) {
    pt_linear_weight weight = c.weight;
    change(weight);
    return pt_linear_forward(&weight, x, nullptr, y, rows, dtype, threads);
  };
  const auto same = [](pt_linear_weight&) {};
  CHECK(status_of(same, 1, 0, 1) == PT_LINEAR_OK);
  CHECK(status_of(same, 0, 0, 1) == PT_LINEAR_OK);
  CHECK(status_of(same, 1, 3, 1) == PT_LINEAR_INVALID_ARGUMENT);
  CHECK_CONTAINS(pt_linear_last_error(), "dtype is 3");
  CHECK(status_of(same, 1, 0, 0) == PT_LINEAR_INVALID_ARGUMENT);
  CHECK(status_of([](pt_linear_weight& w) { w.in = 48; }, 1, 0, 1) == PT_LINEAR_INVALID_ARGUMENT);
  CHECK_CONTAINS(pt_linear_last_error(), "in is 48");
  CHECK(status_of([](pt_linear_weight& w) { w.group_size = 64; }, 1, 0, 1) == PT_LINEAR_INVALID_ARGUMENT);
  CHECK(status_of([](pt_linear_weight& w) { w.group_size = 128; }, 1, 0, 1) == PT_LINEAR_INVALID_ARGUMENT);
  CHECK(status_of([](pt_linear_weight& w) { w.zero = nullptr; }, 1, 0, 1) == PT_LINEAR_INVALID_ARGUMENT);
  CHECK(status_of([](pt_linear_weight& w) { w.kind = 5; }, 1, 0, 1) == PT_LINEAR_INVALID_ARGUMENT);
  CHECK(pt_linear_dequantize(&c.weight, 3, 6, 0, y) == PT_LINEAR_INVALID_ARGUMENT);
}

void check_huge_pages() {
  void* memory = nullptr;
  CHECK(pt_linear_huge_alloc((size_t{2} << 20) + 5, &memory) == PT_LINEAR_OK);
  CHECK(reinterpret_cast<uintptr_t>(memory) % (size_t{2} << 20) == 0);
  auto* bytes = static_cast<unsigned char*>(memory);
  CHECK(bytes[0] == 0 && bytes[(size_t{4} << 20) - 1] == 0);
  bytes[0] = bytes[(size_t{4} << 20) - 1] = 1;
  pt_linear_huge_free(memory, (size_t{2} << 20) + 5);
  CHECK(pt_linear_huge_alloc(0, &memory) == PT_LINEAR_INVALID_ARGUMENT && memory == nullptr);
}

}  // namespace

int main() {
  check_table(pt::linear::baseline::kKernels);
  check_refusals();
  check_huge_pages();
#if defined(PT_HAVE_X86_KERNELS)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) {
    std::puts("skipped the AVX2 half: this processor has no AVX2");
    return kSkip;
  }
  check_table(pt::linear::avx2::kKernels);
#endif
}
