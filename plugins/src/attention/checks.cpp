// SPDX-License-Identifier: Apache-2.0
#include "attention/checks.h"

#include <algorithm>
#include <cinttypes>

#include "attention/kernels.h"

namespace pt::attention {
namespace {

// Sizes whose product is certain to fit an int64_t in bytes.
constexpr int64_t kMaxElements = INT64_MAX / 16;

bool fits(std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes) {
    if (size != 0 && product > kMaxElements / size) return false;
    product *= size;
  }
  return true;
}

void check_sequence(const char* where, const pt_paged_kv& cache, const pt_ragged_batch& batch, int s, int64_t window) {
  const int64_t first = batch.first_token[s], count = batch.num_tokens[s], past = batch.past[s];
  PT_ATTENTION_REQUIRE(first >= 0 && count >= 0 && past >= 0 && first + count <= batch.total_tokens,
                       "%s: sequence %d has first_token %" PRId64 ", num_tokens %" PRId64 ", past %" PRId64
                       ", expected none negative and at most %d tokens in the step",
                       where, s, first, count, past, batch.total_tokens);
  if (count == 0) return;
  const int64_t first_block = std::max<int64_t>(0, past - window) / cache.block_tokens;
  const int64_t last_block = (past + count - 1) / cache.block_tokens;
  PT_ATTENTION_REQUIRE(last_block < batch.max_blocks,
                       "%s: sequence %d reaches position %" PRId64 ", block %" PRId64
                       " of %d tokens, but the block "
                       "table has %d columns",
                       where, s, past + count - 1, last_block, cache.block_tokens, batch.max_blocks);
  const int32_t* table = batch.block_table + s * batch.table_stride;
  for (int64_t i = first_block; i <= last_block; ++i) {
    PT_ATTENTION_REQUIRE(table[i] >= 0 && table[i] < cache.num_blocks,
                         "%s: block_table[%d, %" PRId64 "] is %d, expected 0 to %d (blocks %" PRId64 " to %" PRId64
                         " of this sequence are needed)",
                         where, s, i, table[i], cache.num_blocks - 1, first_block, last_block);
  }
}

}  // namespace

void check_cache(const char* where, const pt_paged_kv* cache) {
  PT_ATTENTION_REQUIRE(cache != nullptr && cache->keys != nullptr && cache->values != nullptr,
                       "%s: the cache, its keys or its values are null", where);
  PT_ATTENTION_REQUIRE(cache->dtype >= PT_FLOAT32 && cache->dtype <= PT_KV_INT8,
                       "%s: the cache's dtype is %d, expected 0 (float32), 1 (bfloat16), 2 (float16) or 3 (int8)",
                       where, cache->dtype);
  PT_ATTENTION_REQUIRE((cache->dtype == PT_KV_INT8) == (cache->key_scales != nullptr && cache->value_scales != nullptr),
                       "%s: scales go with an int8 cache (dtype 3), and only with it; the dtype is %d", where,
                       cache->dtype);
  PT_ATTENTION_REQUIRE(cache->num_blocks > 0 && cache->num_tracks > 0 && cache->num_kv_heads > 0,
                       "%s: the cache has %d blocks, %d tracks, %d key heads, expected at least one of each", where,
                       cache->num_blocks, cache->num_tracks, cache->num_kv_heads);
  PT_ATTENTION_REQUIRE(cache->head_dim > 0 && cache->head_dim <= PT_ATTENTION_MAX_HEAD_DIM && cache->head_dim % 16 == 0,
                       "%s: head_dim is %d, expected a multiple of 16 up to %d", where, cache->head_dim,
                       PT_ATTENTION_MAX_HEAD_DIM);
  PT_ATTENTION_REQUIRE(cache->block_tokens > 0 && cache->block_tokens % kGroupKeys == 0,
                       "%s: block_tokens is %d, expected a multiple of %d", where, cache->block_tokens, kGroupKeys);
  PT_ATTENTION_REQUIRE(
      fits({cache->num_blocks, cache->num_tracks, cache->num_kv_heads, cache->head_dim, cache->block_tokens}),
      "%s: the cache is too large", where);
}

void check_rows(const char* where, const char* name, const pt_rows* rows, int64_t num_tracks, int64_t num_tokens,
                int64_t width) {
  PT_ATTENTION_REQUIRE(rows != nullptr, "%s: %s is null", where, name);
  PT_ATTENTION_REQUIRE(rows->dtype >= PT_FLOAT32 && rows->dtype <= PT_FLOAT16,
                       "%s: %s has dtype %d, expected 0 (float32), 1 (bfloat16) or 2 (float16)", where, name,
                       rows->dtype);
  PT_ATTENTION_REQUIRE(num_tracks >= 0 && num_tokens >= 0 && width > 0,
                       "%s: %s is [%" PRId64 ", %" PRId64 ", %" PRId64 "], expected no negative size and some features",
                       where, name, num_tracks, num_tokens, width);
  if (num_tracks == 0 || num_tokens == 0) return;
  PT_ATTENTION_REQUIRE(rows->data != nullptr, "%s: %s is null", where, name);
  PT_ATTENTION_REQUIRE((num_tokens == 1 || rows->token_stride >= width) && (num_tracks == 1 || rows->track_stride >= 0),
                       "%s: %s has strides %" PRId64 " between tracks and %" PRId64 " between tokens of %" PRId64
                       " features",
                       where, name, rows->track_stride, rows->token_stride, width);
}

void check_threads(const char* where, int num_threads) {
  PT_ATTENTION_REQUIRE(num_threads >= 1 && num_threads <= PT_ATTENTION_MAX_THREADS,
                       "%s: num_threads is %d, expected 1 to %d", where, num_threads, PT_ATTENTION_MAX_THREADS);
}

void check_batch(const char* where, const pt_paged_kv& cache, const pt_ragged_batch* batch, int64_t window) {
  PT_ATTENTION_REQUIRE(batch != nullptr, "%s: the batch is null", where);
  PT_ATTENTION_REQUIRE(batch->num_sequences >= 0 && batch->max_blocks >= 0 && batch->total_tokens >= 0,
                       "%s: the batch has %d sequences, %d columns of blocks, %d tokens, expected none negative", where,
                       batch->num_sequences, batch->max_blocks, batch->total_tokens);
  if (batch->num_sequences == 0) return;
  PT_ATTENTION_REQUIRE(batch->first_token != nullptr && batch->num_tokens != nullptr && batch->past != nullptr &&
                           batch->block_table != nullptr,
                       "%s: an array of the batch is null", where);
  PT_ATTENTION_REQUIRE(batch->num_sequences == 1 || batch->table_stride >= batch->max_blocks,
                       "%s: table_stride is %" PRId64 ", expected at least the %d columns", where, batch->table_stride,
                       batch->max_blocks);
  for (int s = 0; s < batch->num_sequences; ++s) check_sequence(where, cache, *batch, s, window);
}

}  // namespace pt::attention
