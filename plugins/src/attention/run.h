// SPDX-License-Identifier: Apache-2.0
// Cuts a checked step into tasks and runs them with a table of kernels.
#pragma once

#include "attention/kernels.h"

namespace pt::attention {

struct AttendArgs {
  const pt_paged_kv* cache;
  const pt_ragged_batch* batch;
  const pt_rows* query;
  const pt_rows* out;
  int num_heads;
  int64_t window;  // never negative
  float scale;
  int num_threads;
};

// Larger than any position plus anything it is added to.
constexpr int64_t kNoWindow = int64_t{1} << 40;

void run_attend(const Kernels& kernels, const AttendArgs& args);
void run_write(const Kernels& kernels, const pt_paged_kv& cache, const pt_ragged_batch& batch, const pt_rows& key,
               const pt_rows& value, int num_threads);

}  // namespace pt::attention
