// SPDX-License-Identifier: Apache-2.0
// Chooses the instruction set at run time.
#include "common/isa.h"
#include "track_fusion/kernels.h"

namespace pt::track_fusion {
namespace {

#if defined(PT_HAVE_X86_KERNELS)
constexpr std::initializer_list<const Kernels*> kVariants = {&avx512::kKernels, &avx2::kKernels, &baseline::kKernels};
#else
constexpr std::initializer_list<const Kernels*> kVariants = {&baseline::kKernels};
#endif

}  // namespace

const Kernels& select_kernels() { return choose_isa("track_fusion", "PT_TRACK_FUSION_ISA", kVariants); }

}  // namespace pt::track_fusion
