// SPDX-License-Identifier: Apache-2.0
#include "attention/run.h"

#include <algorithm>
#include <vector>

#include "common/pool.h"

namespace pt::attention {
namespace {

// Query rows of a task: their queries and outputs stay in the second-level cache while tiles of keys pass by.
constexpr int64_t kTaskRows = 48;
// Below so many products of query row and key (times head_dim) waking a thread costs more than it saves.
constexpr int64_t kWorthAThread = int64_t{1} << 20;

size_t element_bytes(int dtype) { return dtype == PT_FLOAT32 ? 4 : dtype == PT_KV_INT8 ? 1 : 2; }

void* advance(void* data, int64_t elements, int dtype) {
  return static_cast<char*>(data) + elements * static_cast<int64_t>(element_bytes(dtype));
}

// A piece of one sequence's new tokens.
struct Chunk {
  int sequence;
  int first;  // token of the sequence
  int count;
};

struct Strides {
  explicit Strides(const pt_paged_kv& cache)
      : head(static_cast<size_t>(cache.head_dim) * cache.block_tokens),
        block(head * cache.num_tracks * cache.num_kv_heads),
        scale_block(static_cast<size_t>(cache.block_tokens) * cache.num_tracks * cache.num_kv_heads) {}
  size_t head, block, scale_block;
};

struct AttendRun {
  const Kernels& kernels;
  const AttendArgs& args;
  const std::vector<Chunk>& chunks;
  float* scratch;
  size_t scratch_size;  // of one worker

  void task(int worker, size_t item) const {
    const pt_paged_kv& cache = *args.cache;
    const pt_ragged_batch& batch = *args.batch;
    const Chunk& chunk = chunks[item % chunks.size()];  // neighbours share keys and values
    const int64_t head = static_cast<int64_t>(item / chunks.size());
    const int64_t track = head / cache.num_kv_heads, kv_head = head % cache.num_kv_heads;
    const int64_t group = args.num_heads / cache.num_kv_heads;
    const int64_t token = batch.first_token[chunk.sequence] + chunk.first, feature = kv_head * group * cache.head_dim;
    const Strides strides(cache);
    const int64_t offset = head * static_cast<int64_t>(strides.head), scale_offset = head * cache.block_tokens;
    const auto row = [&](const pt_rows& rows) {
      return advance(rows.data, track * rows.track_stride + token * rows.token_stride + feature, rows.dtype);
    };
    AttendTask work = {};
    work.keys = advance(cache.keys, offset, cache.dtype);
    work.values = advance(cache.values, offset, cache.dtype);
    if (cache.dtype == PT_KV_INT8) {
      work.key_scales = cache.key_scales + scale_offset;
      work.value_scales = cache.value_scales + scale_offset;
    }
    work.block_stride = strides.block;
    work.scale_block_stride = strides.scale_block;
    work.table = batch.block_table + chunk.sequence * batch.table_stride;
    work.block_tokens = cache.block_tokens;
    work.head_dim = cache.head_dim;
    work.query = row(*args.query);
    work.out = row(*args.out);
    work.query_token_stride = args.query->token_stride;
    work.out_token_stride = args.out->token_stride;
    work.query_dtype = args.query->dtype;
    work.out_dtype = args.out->dtype;
    work.group = group;
    work.num_tokens = chunk.count;
    work.position = batch.past[chunk.sequence] + int64_t{chunk.first};
    work.window = args.window;
    work.scale = args.scale;
    work.scratch = scratch + static_cast<size_t>(worker) * scratch_size;
    kernels.attend[cache.dtype](work);
  }
};

struct WriteRun {
  const Kernels& kernels;
  const pt_paged_kv& cache;
  const pt_ragged_batch& batch;
  const pt_rows& key;
  const pt_rows& value;

  void head(int64_t head) const {
    const int64_t track = head / cache.num_kv_heads, feature = head % cache.num_kv_heads * cache.head_dim;
    const Strides strides(cache);
    const int64_t offset = head * static_cast<int64_t>(strides.head), scale_offset = head * cache.block_tokens;
    WriteTask work = {};
    work.keys = advance(cache.keys, offset, cache.dtype);
    work.values = advance(cache.values, offset, cache.dtype);
    if (cache.dtype == PT_KV_INT8) {
      work.key_scales = cache.key_scales + scale_offset;
      work.value_scales = cache.value_scales + scale_offset;
    }
    work.block_stride = strides.block;
    work.scale_block_stride = strides.scale_block;
    work.block_tokens = cache.block_tokens;
    work.head_dim = cache.head_dim;
    work.key_token_stride = key.token_stride;
    work.value_token_stride = value.token_stride;
    for (int s = 0; s < batch.num_sequences; ++s) {
      const int64_t token = batch.first_token[s];
      const auto row = [&](const pt_rows& rows) {
        return advance(rows.data, track * rows.track_stride + token * rows.token_stride + feature, rows.dtype);
      };
      work.key = row(key);
      work.value = row(value);
      work.table = batch.block_table + s * batch.table_stride;
      work.num_tokens = batch.num_tokens[s];
      work.position = batch.past[s];
      kernels.write[key.dtype][cache.dtype](work);
    }
  }
};

}  // namespace

void run_attend(const Kernels& kernels, const AttendArgs& args) {
  const pt_paged_kv& cache = *args.cache;
  const pt_ragged_batch& batch = *args.batch;
  const int64_t group = args.num_heads / cache.num_kv_heads;
  const int64_t task_tokens = std::max<int64_t>(1, kTaskRows / group);
  // Kept by the thread: a decode step calls this once per layer.
  static thread_local std::vector<Chunk> chunks;
  static thread_local std::vector<float> scratch;
  chunks.clear();
  int64_t longest = 0, products = 0;
  for (int s = 0; s < batch.num_sequences; ++s) {
    const int64_t count = batch.num_tokens[s];
    for (int64_t first = 0; first < count; first += task_tokens) {
      const int64_t here = std::min(task_tokens, count - first);
      chunks.push_back({s, static_cast<int>(first), static_cast<int>(here)});
      longest = std::max(longest, here);
    }
    products += count * std::min<int64_t>(batch.past[s] + count, args.window + count);
  }
  if (chunks.empty()) return;
  const int64_t heads = int64_t{cache.num_tracks} * cache.num_kv_heads;
  products *= heads * group * cache.head_dim;
  const int threads = products < kWorthAThread ? 1 : args.num_threads;
  const size_t scratch_size = static_cast<size_t>(longest * group) * PT_ATTENTION_ROW_FLOATS(cache.head_dim) +
                              kMaxLanes;  // the spare keeps workers off each other's cache lines
  if (scratch.size() < scratch_size * static_cast<size_t>(threads)) {
    scratch.resize(scratch_size * static_cast<size_t>(threads));
  }
  AttendRun run{kernels, args, chunks, scratch.data(), scratch_size};
  Pool::shared().run(
      [](void* context, int worker, uint32_t item) { static_cast<AttendRun*>(context)->task(worker, item); }, &run,
      static_cast<uint32_t>(chunks.size() * static_cast<size_t>(heads)), threads);
}

void run_write(const Kernels& kernels, const pt_paged_kv& cache, const pt_ragged_batch& batch, const pt_rows& key,
               const pt_rows& value, int num_threads) {
  WriteRun run{kernels, cache, batch, key, value};
  const int64_t heads = int64_t{cache.num_tracks} * cache.num_kv_heads;
  const bool worth_it = int64_t{batch.total_tokens} * heads * cache.head_dim >= kWorthAThread;
  Pool::shared().run([](void* context, int, uint32_t item) { static_cast<WriteRun*>(context)->head(item); }, &run,
                     static_cast<uint32_t>(heads), worth_it ? num_threads : 1);
}

}  // namespace pt::attention
