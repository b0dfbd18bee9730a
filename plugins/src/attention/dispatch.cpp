// SPDX-License-Identifier: Apache-2.0
// Chooses the instruction set at run time.
#include <cstdlib>
#include <cstring>

#include "attention/kernels.h"
#include "common/error.h"

namespace pt::attention {
namespace {

struct Variant {
  const Kernels* kernels;
  bool supported;
};

// Fastest first. The conditions are what -march=x86-64-v3 and -v4 let the compiler use.
template <typename Visit>
void for_each_variant(Visit&& visit) {
#if defined(PT_HAVE_X86_KERNELS)
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("lzcnt");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  visit(Variant{&avx512::kKernels, v4});
  visit(Variant{&avx2::kKernels, v3});
#endif
  visit(Variant{&baseline::kKernels, true});
}

const Kernels& choose() {
  const char* wanted = std::getenv("PT_KERNELS_ISA");
  const Kernels* chosen = nullptr;
  bool known = false;
  for_each_variant([&](const Variant& variant) {
    if (wanted != nullptr && *wanted != '\0' && std::strcmp(wanted, variant.kernels->name) != 0) return;
    known = true;
    if (variant.supported && chosen == nullptr) chosen = variant.kernels;
  });
  if (chosen != nullptr) return *chosen;
  throw Error(PT_UNSUPPORTED,
              format_text(known ? "attention: PT_KERNELS_ISA is '%s', which this processor cannot run; unset it to "
                                  "choose automatically"
                                : "attention: PT_KERNELS_ISA is '%s', expected baseline, avx2 or avx512 and a build "
                                  "that has it",
                          wanted));
}

}  // namespace

const Kernels& select_kernels() {
  static const Kernels& chosen = choose();  // tried again by the next call when it throws
  return chosen;
}

const Kernels* kernels_named(const char* name) {
  const Kernels* found = nullptr;
  for_each_variant([&](const Variant& variant) {
    if (variant.supported && std::strcmp(name, variant.kernels->name) == 0) found = variant.kernels;
  });
  return found;
}

}  // namespace pt::attention
