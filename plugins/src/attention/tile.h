// SPDX-License-Identifier: Apache-2.0
// The two register-blocked loops: scores of some rows against some keys, and the sum of values weighted by them. Each
// number is one chain of multiply-adds in a fixed order (over features, over keys), whatever the blocking around it.
#pragma once

#include "attention/kernels.h"
#include "attention/simd.h"

namespace pt::attention {
namespace {

constexpr int kGroupsPerTile = kTileKeys / kGroupKeys;
constexpr int kVecsPerGroup = kGroupKeys / kLanes;
// Rows that share a load of keys or values. Registers: rows * vectors of sums, the smaller of the two for operands,
// one.
constexpr int kRowsAtOnce = kLanes == 4 ? 3 : kMaxRowsAtOnce;
constexpr int kVecsAtOnce[] = {0, 8, 4, 4, 2, 2, 2};  // by rows; 8 independent sums hide the latency

constexpr int groups_at_once(int rows) {
  const int groups = kVecsAtOnce[rows] / kVecsPerGroup;
  return groups > kGroupsPerTile ? kGroupsPerTile : groups > 1 ? groups : 1;
}

// Where the keys and values of a tile are: element pointers of its groups of 16 positions; null where not visible.
template <typename Type>
struct Tile {
  const typename Type::Storage* keys[kGroupsPerTile];    // [head_dim][key_stride]
  const typename Type::Storage* values[kGroupsPerTile];  // [16][head_dim]
  const float* key_scales[kGroupsPerTile];
  const float* value_scales[kGroupsPerTile];
  const typename Type::Storage* next_keys[kGroupsPerTile];  // of the tile after it, never null: only prefetched
  int64_t key_stride;
  int64_t head_dim;
};

// sums[row][v] += left(row) * right(v). The operand with fewer values stays in registers.
template <int kRows, int kVecs, typename Left, typename Right>
__attribute__((always_inline)) inline void multiply_block(Vec (&sums)[kRows][kVecs], Left&& left, Right&& right) {
  if constexpr (kRows < kVecs) {
    Vec held[kRows];
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) held[row] = left(row);
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      const Vec passing = right(v);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) sums[row][v] = multiply_add(held[row], passing, sums[row][v]);
    }
  } else {
    Vec held[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) held[v] = right(v);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const Vec passing = left(row);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) sums[row][v] = multiply_add(passing, held[v], sums[row][v]);
    }
  }
}

// scores[row][key] = sum over features of query[feature][row] * key, for kGroups neighbouring groups. Meanwhile the
// values of those groups are on their way from memory: the hardware does not see that they come next.
template <typename Type, int kRows, int kGroups>
__attribute__((noinline)) void score_groups(const float* query, int64_t query_stride, const Tile<Type>& tile,
                                            int first_group, float* scores) {
  using Storage = typename Type::Storage;
  constexpr int kVecs = kGroups * kVecsPerGroup;
  const Storage *keys[kGroups], *values[kGroups];
  for (int g = 0; g < kGroups; ++g) keys[g] = tile.keys[first_group + g], values[g] = tile.values[first_group + g];
  const int64_t dim = tile.head_dim, stride = tile.key_stride;
  Vec sums[kRows][kVecs] = {};
  for (int64_t d = 0; d < dim; ++d) {
    multiply_block<kRows, kVecs>(
        sums, [&](int row) { return all(query[row]); },
        [&](int v) { return Type::load(keys[v / kVecsPerGroup] + v % kVecsPerGroup * kLanes); });
    query += query_stride;
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      __builtin_prefetch(values[g]);
      keys[g] += stride;
      values[g] += kGroupKeys;
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v)
      store(scores + row * kTileKeys + first_group * kGroupKeys + v * kLanes, sums[row][v]);
  }
}

template <typename Type, int kRows>
inline void score_rows(const float* query, int64_t query_stride, const Tile<Type>& tile, int first_group, int end_group,
                       float* scores) {
  constexpr int kGroups = groups_at_once(kRows);
  int group = first_group;
  for (; group + kGroups <= end_group; group += kGroups) {
    score_groups<Type, kRows, kGroups>(query, query_stride, tile, group, scores);
  }
  for (; group < end_group; ++group) score_groups<Type, kRows, 1>(query, query_stride, tile, group, scores);
}

// output[row][feature] = output * factors[row] + sum over keys first .. end - 1 of weights[row][key] * value. As many
// keys of the next tile are prefetched as values are read.
template <typename Type, int kRows, int kVecs>
__attribute__((noinline)) void accumulate_features(const float* weights, const float* factors, const Tile<Type>& tile,
                                                   int first, int end, int64_t feature, float* output) {
  using Storage = typename Type::Storage;
  constexpr int kAhead = kVecs * kLanes / kGroupKeys;  // rows of the next keys per value row
  const int64_t dim = tile.head_dim, stride = tile.key_stride;
  Vec sums[kRows][kVecs];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    const Vec factor = all(factors[row]);
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) sums[row][v] = load(output + row * dim + feature + v * kLanes) * factor;
  }
  for (int group = first / kGroupKeys; group * kGroupKeys < end; ++group) {
    const int from = group * kGroupKeys;
    const int start = first > from ? first - from : 0, stop = end - from < kGroupKeys ? end - from : kGroupKeys;
    const Storage* value = tile.values[group] + start * dim + feature;
    const Storage* ahead = tile.next_keys[group] + (feature + start * kAhead) * stride;
    const float* weight = weights + from;
    for (int key = start; key < stop; ++key) {
      multiply_block<kRows, kVecs>(
          sums, [&](int row) { return all(weight[row * kTileKeys + key]); },
          [&](int v) { return Type::load(value + v * kLanes); });
      value += dim;
#pragma GCC unroll 8
      for (int d = 0; d < kAhead; ++d, ahead += stride) __builtin_prefetch(ahead);
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) store(output + row * dim + feature + v * kLanes, sums[row][v]);
  }
}

template <typename Type, int kRows>
inline void accumulate_rows(const float* weights, const float* factors, const Tile<Type>& tile, int first, int end,
                            float* output) {
  constexpr int kVecs = kVecsAtOnce[kRows];
  int64_t feature = 0;
  for (; feature + kVecs * kLanes <= tile.head_dim; feature += kVecs * kLanes) {
    accumulate_features<Type, kRows, kVecs>(weights, factors, tile, first, end, feature, output);
  }
  constexpr int kRest = kVecsPerGroup > 2 ? 2 : kVecsPerGroup;  // head_dim is a multiple of 16
  for (; feature < tile.head_dim; feature += kRest * kLanes) {
    accumulate_features<Type, kRows, kRest>(weights, factors, tile, first, end, feature, output);
  }
}

// The run-time number of rows, 1 to kRowsAtOnce, as a template argument.
template <typename Body>
inline void with_rows(int rows, Body&& body) {
  switch (rows) {
    case 1:
      return body.template operator()<1>();
    case 2:
      return body.template operator()<2>();
    case 3:
      return body.template operator()<3>();
  }
  if constexpr (kRowsAtOnce > 3) {
    switch (rows) {
      case 4:
        return body.template operator()<4>();
      case 5:
        return body.template operator()<5>();
      case 6:
        return body.template operator()<6>();
    }
  }
}

}  // namespace
}  // namespace pt::attention
