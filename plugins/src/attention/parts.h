// SPDX-License-Identifier: Apache-2.0
// Parts of one instruction set's table.
#pragma once

#include "attention/kernels.h"

namespace pt::attention::PT_KERNELS_ISA {

extern const AttendKernel kAttend[4];
extern const WriteKernel kWrite[3][4];

}  // namespace pt::attention::PT_KERNELS_ISA
