// SPDX-License-Identifier: Apache-2.0
// Online softmax over tiles of keys. Compiled once per instruction set.
//
// Every row meets its keys in tiles of 64 positions, tile t = positions 64t to 64t + 63, from the first one it sees to
// its own. Within a tile only that row's keys count: a hidden key's value is not multiplied by zero but left out, so
// that a NaN or a freed block that other rows see (or nobody does) cannot reach it.
#include "attention/parts.h"
#include "attention/tile.h"

namespace pt::attention::PT_KERNELS_ISA {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kInfinity = __builtin_inff();

// Working memory of a task: rows are (token, head of the group) pairs, tokens first.
struct Rows {
  explicit Rows(const AttendTask& task)
      : count(task.num_tokens * task.group),
        query(task.scratch),
        output(query + count * task.head_dim),
        sums(output + count * task.head_dim),
        maxima(sums + count * kMaxLanes),
        scores(maxima + count),
        factors(scores + count * kTileKeys) {}
  int64_t count;
  float* query;    // [head_dim, rows], times scale * log2(e)
  float* output;   // [rows, head_dim], relative to 2^maximum
  float* sums;     // [rows, kMaxLanes] likewise
  float* maxima;   // [rows]
  float* scores;   // [rows, kTileKeys]
  float* factors;  // [rows]: what a tile multiplies the output so far by
};

template <typename Type>
inline void load_row(const void* source, int64_t offset, float* values, int64_t count) {
  numeric::load_tile<Type>(static_cast<const typename Type::Storage*>(source) + offset, values,
                           static_cast<size_t>(count));
}

void load_query(const AttendTask& task, const Rows& rows) {
  const int64_t dim = task.head_dim;
  const float factor = task.scale * kLog2E;
  alignas(64) float values[PT_ATTENTION_MAX_HEAD_DIM];
  for (int64_t row = 0; row < rows.count; ++row) {
    const int64_t offset = row / task.group * task.query_token_stride + row % task.group * dim;
    if (task.query_dtype == PT_FLOAT32) load_row<Float32>(task.query, offset, values, dim);
    if (task.query_dtype == PT_BFLOAT16) load_row<Bfloat16>(task.query, offset, values, dim);
    if (task.query_dtype == PT_FLOAT16) load_row<Float16>(task.query, offset, values, dim);
    for (int64_t d = 0; d < dim; ++d) rows.query[d * rows.count + row] = values[d] * factor;
  }
  for (int64_t i = 0; i < rows.count * dim; ++i) rows.output[i] = 0.0f;
  for (int64_t i = 0; i < rows.count * kMaxLanes; ++i) rows.sums[i] = 0.0f;
  for (int64_t i = 0; i < rows.count; ++i) rows.maxima[i] = -kInfinity;
}

template <typename Type>
inline void store_row(float* values, void* target, int64_t offset, int64_t count) {
  numeric::store_tile<Type>(values, static_cast<typename Type::Storage*>(target) + offset, static_cast<size_t>(count));
}

void store_output(const AttendTask& task, const Rows& rows) {
  const int64_t dim = task.head_dim;
  for (int64_t row = 0; row < rows.count; ++row) {
    float* values = rows.output + row * dim;
    const float inverse = 1.0f / sum_lanes(load(rows.sums + row * kMaxLanes));
    for (int64_t i = 0; i < dim; ++i) values[i] *= inverse;
    const int64_t offset = row / task.group * task.out_token_stride + row % task.group * dim;
    if (task.out_dtype == PT_FLOAT32) store_row<Float32>(values, task.out, offset, dim);
    if (task.out_dtype == PT_BFLOAT16) store_row<Bfloat16>(values, task.out, offset, dim);
    if (task.out_dtype == PT_FLOAT16) store_row<Float16>(values, task.out, offset, dim);
  }
}

// Keys of the tile that starts at `start` and the row sees: first to end - 1, counted from the start.
struct Span {
  int first;
  int end;
};

inline Span visible(const AttendTask& task, int64_t row, int64_t start) {
  const int64_t position = task.position + row / task.group;
  const int64_t first = position - task.window - start, end = position + 1 - start;
  return {static_cast<int>(first < 0 ? 0 : first), static_cast<int>(end < kTileKeys ? end : kTileKeys)};
}

// Tokens of the task that see a key of the tile at `start`, and the groups of keys that they see.
struct Reach {
  int64_t first_token, end_token;
  int first_group, end_group;
};

Reach reach(const AttendTask& task, int64_t start) {
  Reach found;
  found.first_token = start > task.position ? start - task.position : 0;
  const int64_t beyond = start + kTileKeys - task.position + task.window;  // from here on the window begins later
  found.end_token = beyond < task.num_tokens ? beyond : task.num_tokens;
  const int64_t oldest = task.position + found.first_token - task.window - start;
  const int64_t newest = task.position + found.end_token - 1 - start;
  found.first_group = oldest > 0 ? static_cast<int>(oldest) / kGroupKeys : 0;
  found.end_group = newest >= kTileKeys ? kGroupsPerTile : static_cast<int>(newest) / kGroupKeys + 1;
  return found;
}

template <typename Type>
Tile<Type> find_tile(const AttendTask& task, int64_t start, const Reach& seen) {
  using Storage = typename Type::Storage;
  Tile<Type> tile = {};
  tile.key_stride = task.block_tokens;
  tile.head_dim = task.head_dim;
  for (int g = seen.first_group; g < seen.end_group; ++g) {
    const int64_t position = start + g * kGroupKeys;
    const int64_t inside = position % task.block_tokens;
    const size_t block = static_cast<size_t>(task.table[position / task.block_tokens]);
    tile.keys[g] = static_cast<const Storage*>(task.keys) + block * task.block_stride + inside;
    tile.values[g] = static_cast<const Storage*>(task.values) + block * task.block_stride + inside * task.head_dim;
    if (task.key_scales != nullptr) {
      tile.key_scales[g] = task.key_scales + block * task.scale_block_stride + inside;
      tile.value_scales[g] = task.value_scales + block * task.scale_block_stride + inside;
    }
  }
  return tile;
}

// Scores to weights 2^(score - maximum), updating the row's maximum and sums; the factor rescales what came before.
template <typename Type>
float weigh(const Tile<Type>& tile, Span span, float* scores, float* maximum, float* sums) {
  const int begin = span.first / kGroupKeys * kGroupKeys;
  const int stop = (span.end + kGroupKeys - 1) / kGroupKeys * kGroupKeys;
  const bool partial = begin != span.first || stop != span.end;
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  Vec largest = all(-kInfinity);
  for (int key = begin; key < stop; key += kLanes) {
    Vec score = load(scores + key);
    if constexpr (sizeof(typename Type::Storage) == 1) {
      score *= load(tile.key_scales[key / kGroupKeys] + key % kGroupKeys);
    }
    if (partial) score = select((lane + key >= span.first) & (lane + key < span.end), score, all(-kInfinity));
    store(scores + key, score);
    largest = select(score > largest, score, largest);
  }
  const float here = max_lane(largest);
  const float updated = here > *maximum ? here : *maximum;
  const Vec factor = exp2(all(*maximum - updated));
  Vec sum = load(sums) * factor;
  for (int key = begin; key < stop; key += kLanes) {
    Vec weight = exp2(load(scores + key) - all(updated));
    sum += weight;
    if constexpr (sizeof(typename Type::Storage) == 1) {
      weight *= load(tile.value_scales[key / kGroupKeys] + key % kGroupKeys);
    }
    store(scores + key, weight);
  }
  store(sums, sum);
  *maximum = updated;
  return factor[0];
}

// Values of the keys that all rows see go through the registers together; the ragged ends row by row. Per row the
// order is the same as alone: ascending keys.
template <typename Type>
void add_values(const AttendTask& task, const Rows& rows, const Tile<Type>& tile, int64_t start, int64_t first,
                int count) {
  Span spans[kMaxRowsAtOnce] = {};
  Span common = {0, kTileKeys};
  for (int row = 0; row < count; ++row) {
    spans[row] = visible(task, first + row, start);
    common.first = spans[row].first > common.first ? spans[row].first : common.first;
    common.end = spans[row].end < common.end ? spans[row].end : common.end;
  }
  const float* weights = rows.scores + first * kTileKeys;
  float *factors = rows.factors + first, *output = rows.output + first * task.head_dim;
  const auto alone = [&](int row, int from, int to) {
    if (from >= to) return;
    accumulate_rows<Type, 1>(weights + row * kTileKeys, factors + row, tile, from, to, output + row * task.head_dim);
    factors[row] = 1.0f;
  };
  if (common.first >= common.end) {
    for (int row = 0; row < count; ++row) alone(row, spans[row].first, spans[row].end);
    return;
  }
  for (int row = 0; row < count; ++row) alone(row, spans[row].first, common.first);
  with_rows(count, [&]<int kRows>() {
    accumulate_rows<Type, kRows>(weights, factors, tile, common.first, common.end, output);
  });
  for (int row = 0; row < count; ++row) {
    factors[row] = 1.0f;
    alone(row, common.end, spans[row].end);
  }
}

// Calls body(first row, number of rows) for even portions: 8 rows as 4 + 4, not 6 + 2.
template <typename Body>
inline void for_portions(int64_t row, int64_t end_row, Body&& body) {
  while (row < end_row) {
    const int64_t left = end_row - row, portions = (left + kRowsAtOnce - 1) / kRowsAtOnce;
    const int count = static_cast<int>((left + portions - 1) / portions);
    body(row, count);
    row += count;
  }
}

template <typename Type>
void attend(const AttendTask& task) {
  const Rows rows(task);
  const int64_t last = task.position + task.num_tokens - 1;
  const int64_t first_key = task.position > task.window ? task.position - task.window : 0;
  int64_t start = first_key / kTileKeys * kTileKeys;
  Reach seen = reach(task, start);
  Tile<Type> tile = find_tile<Type>(task, start, seen);
  load_query(task, rows);
  for (; start <= last; start += kTileKeys) {
    const bool more = start + kTileKeys <= last;
    const Reach seen_next = more ? reach(task, start + kTileKeys) : seen;
    const Tile<Type> next = more ? find_tile<Type>(task, start + kTileKeys, seen_next) : tile;
    for (int g = 0; g < kGroupsPerTile; ++g) {
      tile.next_keys[g] = next.keys[g] != nullptr ? next.keys[g] : tile.keys[seen.first_group];
    }
    // All rows with the keys, then all with the values: each half of a tile fits the first-level cache alone.
    const int64_t begin_row = seen.first_token * task.group, end_row = seen.end_token * task.group;
    for_portions(begin_row, end_row, [&](int64_t row, int count) {
      with_rows(count, [&]<int kRows>() {
        score_rows<Type, kRows>(rows.query + row, rows.count, tile, seen.first_group, seen.end_group,
                                rows.scores + row * kTileKeys);
      });
    });
    for (int64_t row = begin_row; row < end_row; ++row) {
      rows.factors[row] = weigh(tile, visible(task, row, start), rows.scores + row * kTileKeys, rows.maxima + row,
                                rows.sums + row * kMaxLanes);
    }
    for_portions(begin_row, end_row, [&](int64_t row, int count) { add_values(task, rows, tile, start, row, count); });
    seen = seen_next;
    tile = next;
  }
  store_output(task, rows);
}

}  // namespace

const AttendKernel kAttend[4] = {attend<StoredFloat32>, attend<StoredBfloat16>, attend<StoredFloat16>,
                                 attend<StoredInt8>};

}  // namespace pt::attention::PT_KERNELS_ISA
