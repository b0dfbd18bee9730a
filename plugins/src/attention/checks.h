// SPDX-License-Identifier: Apache-2.0
// What the C ABI refuses. Everything throws pt::Error with the values found and what was expected.
#pragma once

#include "common/error.h"
#include "pt/attention.h"

namespace pt::attention {

#define PT_ATTENTION_REQUIRE(condition, ...)                                                                  \
  do {                                                                                                        \
    if (!(condition)) throw ::pt::Error(PT_INVALID_ARGUMENT, "attention: " + ::pt::format_text(__VA_ARGS__)); \
  } while (false)

void check_cache(const char* where, const pt_paged_kv* cache);
void check_rows(const char* where, const char* name, const pt_rows* rows, int64_t num_tracks, int64_t num_tokens,
                int64_t width);
void check_threads(const char* where, int num_threads);

// Sequences lie inside the step and their tables hold every block of positions past - window .. past + num_tokens - 1.
void check_batch(const char* where, const pt_paged_kv& cache, const pt_ragged_batch* batch, int64_t window);

}  // namespace pt::attention
