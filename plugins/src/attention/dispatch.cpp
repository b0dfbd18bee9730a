// SPDX-License-Identifier: Apache-2.0
// Chooses the instruction set at run time.
#include "attention/kernels.h"
#include "common/isa.h"

namespace pt::attention {
namespace {

#if defined(PT_HAVE_X86_KERNELS)
constexpr std::initializer_list<const Kernels*> kVariants = {&avx512::kKernels, &avx2::kKernels, &baseline::kKernels};
#else
constexpr std::initializer_list<const Kernels*> kVariants = {&baseline::kKernels};
#endif

}  // namespace

const Kernels& select_kernels() {
  static const Kernels& chosen = choose_isa("attention", "PT_KERNELS_ISA", kVariants);  // tried again when it throws
  return chosen;
}

const Kernels* kernels_named(const char* name) { return isa_named(kVariants, name); }

}  // namespace pt::attention
