// SPDX-License-Identifier: Apache-2.0
// The C ABI of cache and attention: checks arguments, translates exceptions. Nothing else.
#include <cmath>

#include "attention/checks.h"
#include "attention/run.h"

using namespace pt::attention;

extern "C" {

const char* pt_attention_last_error(void) noexcept { return pt::last_error(); }

int pt_attention_abi_version(void) noexcept { return PT_ATTENTION_ABI_VERSION; }

const char* pt_attention_isa(void) noexcept {
  const char* name = nullptr;
  pt::guarded([&] { name = select_kernels().name; });
  return name;
}

int pt_attention_write(const pt_paged_kv* cache, const pt_ragged_batch* batch, const pt_rows* key, const pt_rows* value,
                       int num_threads) noexcept {
  return pt::guarded([&] {
    check_cache("write", cache);
    check_batch("write", *cache, batch, 0);
    const int64_t width = int64_t{cache->num_kv_heads} * cache->head_dim;
    check_rows("write", "key", key, cache->num_tracks, batch->total_tokens, width);
    check_rows("write", "value", value, cache->num_tracks, batch->total_tokens, width);
    PT_ATTENTION_REQUIRE(key->dtype == value->dtype, "write: key has dtype %d and value %d, expected one", key->dtype,
                         value->dtype);
    check_threads("write", num_threads);
    run_write(select_kernels(), *cache, *batch, *key, *value, num_threads);
  });
}

int pt_attention_attend(const pt_paged_kv* cache, const pt_ragged_batch* batch, const pt_rows* query, int num_heads,
                        int64_t window, float scale, const pt_rows* out, int num_threads) noexcept {
  return pt::guarded([&] {
    check_cache("attend", cache);
    PT_ATTENTION_REQUIRE(window >= -1, "attend: window is %lld, expected -1 (everything) or more",
                         static_cast<long long>(window));
    const int64_t reach = window < 0 || window > kNoWindow ? kNoWindow : window;
    check_batch("attend", *cache, batch, reach);
    PT_ATTENTION_REQUIRE(num_heads > 0 && num_heads % cache->num_kv_heads == 0,
                         "attend: %d query heads, expected a multiple of the %d key heads", num_heads,
                         cache->num_kv_heads);
    const int64_t width = int64_t{num_heads} * cache->head_dim;
    check_rows("attend", "query", query, cache->num_tracks, batch->total_tokens, width);
    check_rows("attend", "out", out, cache->num_tracks, batch->total_tokens, width);
    PT_ATTENTION_REQUIRE(std::isfinite(scale), "attend: scale is %g, expected a finite number",
                         static_cast<double>(scale));
    check_threads("attend", num_threads);
    run_attend(select_kernels(), {cache, batch, query, out, num_heads, reach, scale, num_threads});
  });
}

}  // extern "C"
