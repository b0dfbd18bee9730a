// SPDX-License-Identifier: Apache-2.0
// Chooses the instruction set at run time.
#include "common/isa.h"
#include "linear/kernels.h"

namespace pt::linear {
namespace {

#if defined(PT_HAVE_X86_KERNELS)
constexpr std::initializer_list<const Kernels*> kVariants = {&avx512::kKernels, &avx2::kKernels, &baseline::kKernels};
#else
constexpr std::initializer_list<const Kernels*> kVariants = {&baseline::kKernels};
#endif

}  // namespace

const Kernels& select_kernels() {
  static const Kernels& chosen = choose_isa("linear", "PT_KERNELS_ISA", kVariants);  // tried again when it throws
  return chosen;
}

}  // namespace pt::linear
