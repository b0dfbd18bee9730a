// SPDX-License-Identifier: Apache-2.0
// One product: operand, cut over threads, epilogue. Arguments are checked already.
#pragma once

#include <cstddef>

#include "linear/kernels.h"

namespace pt::linear {

// `up` null: y = x @ weight^T + bias. Otherwise y = silu(x @ weight^T) * (x @ up^T).
struct Product {
  const pt_linear_weight* weight;
  const pt_linear_weight* up;
  const void* x;
  const void* bias;
  void* y;
  size_t rows;
  int dtype;
};

void run_product(const Kernels& kernels, const Product& product, int num_threads);

}  // namespace pt::linear
