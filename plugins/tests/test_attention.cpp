// SPDX-License-Identifier: Apache-2.0
// Paged attention of one instruction set (the argument) against a plain reference in double precision; the arithmetic
// that must not depend on batch, chunks and threads; and what the C ABI refuses.
#include <algorithm>
#include <cmath>
#include <random>

#include "attention/run.h"
#include "check.h"
#include "common/error.h"

using namespace pt;
using attention::Kernels;

namespace {

struct Sequence {
  int past;
  int count;
};

// float32 cache and activations; blocks handed out in random order, poisoned with NaN where nothing is visible.
struct Step {
  int tracks, heads, kv_heads, dim, block, num_blocks;
  int64_t window;
  std::vector<Sequence> sequences;
  std::vector<float> keys, values, key, value, query, out;  // key, value: [tracks, sum of totals, kv_heads, dim]
  std::vector<int32_t> first, count, past, table;
  int columns = 0, new_tokens = 0;

  Step(std::mt19937& random, int tracks, int heads, int kv_heads, int dim, int block, int64_t window,
       std::vector<Sequence> sequences)
      : tracks(tracks),
        heads(heads),
        kv_heads(kv_heads),
        dim(dim),
        block(block),
        window(window),
        sequences(std::move(sequences)) {
    int total = 0;
    for (const Sequence& s : this->sequences) {
      columns = std::max(columns, (s.past + s.count + block - 1) / block);
      total += s.past + s.count;
      first.push_back(new_tokens);
      count.push_back(s.count);
      past.push_back(s.past);
      new_tokens += s.count;
    }
    num_blocks = columns * static_cast<int>(this->sequences.size());
    for (int i = 0; i < num_blocks; ++i) table.push_back(i);
    std::shuffle(table.begin(), table.end(), random);
    const size_t pool = static_cast<size_t>(num_blocks) * tracks * kv_heads * dim * block;
    keys.assign(pool, NAN);
    values.assign(pool, NAN);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& data, size_t size) {
      data.resize(size);
      for (float& x : data) x = normal(random);
    };
    fill(key, static_cast<size_t>(tracks) * total * kv_heads * dim);
    fill(value, key.size());
    fill(query, static_cast<size_t>(tracks) * new_tokens * heads * dim);
    out.assign(query.size(), NAN);
  }

  int total() const { return static_cast<int>(key.size()) / (tracks * kv_heads * dim); }

  pt_paged_kv cache() {
    return {keys.data(), values.data(), nullptr, nullptr, num_blocks, tracks, kv_heads, dim, block, PT_FLOAT32};
  }

  pt_ragged_batch batch() {
    return {first.data(), count.data(), past.data(), table.data(), columns, static_cast<int>(sequences.size()),
            columns,      new_tokens};
  }

  static pt_rows rows(std::vector<float>& data, int tokens, int width) {
    return {data.data(), int64_t{tokens} * width, width, PT_FLOAT32};
  }

  // Everything of every sequence, as one chunk each.
  void write(const Kernels& kernels, int threads) {
    std::vector<int32_t> starts, counts, zeros(sequences.size(), 0);
    int at = 0;
    for (const Sequence& s : sequences) {
      starts.push_back(at);
      counts.push_back(s.past + s.count);
      at += counts.back();
    }
    const pt_ragged_batch all = {starts.data(), counts.data(),
                                 zeros.data(),  table.data(),
                                 columns,       static_cast<int>(sequences.size()),
                                 columns,       at};
    attention::run_write(kernels, cache(), all, rows(key, at, kv_heads * dim), rows(value, at, kv_heads * dim),
                         threads);
  }

  void attend(const Kernels& kernels, int threads) {
    const pt_paged_kv kv = cache();
    const pt_ragged_batch step = batch();
    const pt_rows from = rows(query, new_tokens, heads * dim), to = rows(out, new_tokens, heads * dim);
    const int64_t reach = window < 0 ? attention::kNoWindow : window;
    attention::run_attend(kernels, {&kv, &step, &from, &to, heads, reach, 1.0f / std::sqrt(float(dim)), threads});
  }

  double worst_error() const {
    double worst = 0;
    int start = 0;
    for (size_t s = 0; s < sequences.size(); start += sequences[s].past + sequences[s].count, ++s) {
      for (int t = 0; t < tracks; ++t) {
        for (int token = 0; token < sequences[s].count; ++token) {
          for (int h = 0; h < heads; ++h) worst = std::max(worst, error_of(s, start, t, token, h));
        }
      }
    }
    return worst;
  }

  double error_of(size_t s, int start, int t, int token, int h) const {
    const int position = sequences[s].past + token;
    const int oldest = window < 0 || window > position ? 0 : position - static_cast<int>(window);
    const auto stored = [&](const std::vector<float>& data, int p) {
      return &data[((static_cast<size_t>(t) * total() + start + p) * kv_heads + h / (heads / kv_heads)) * dim];
    };
    const size_t row = ((static_cast<size_t>(t) * new_tokens + first[s] + token) * heads + h) * dim;
    std::vector<double> expected(dim), weights;
    double largest = -INFINITY, sum = 0, worst = 0;
    for (int p = oldest; p <= position; ++p) {
      double score = 0;
      for (int d = 0; d < dim; ++d) score += double(query[row + d]) * stored(key, p)[d];
      weights.push_back(score / std::sqrt(double(dim)));
      largest = std::max(largest, weights.back());
    }
    for (double& weight : weights) sum += weight = std::exp(weight - largest);
    for (int p = oldest; p <= position; ++p) {
      for (int d = 0; d < dim; ++d) expected[d] += weights[p - oldest] / sum * stored(value, p)[d];
    }
    for (int d = 0; d < dim; ++d) {
      const double error = std::abs(expected[d] - out[row + d]);
      worst = error <= worst ? worst : error;  // NaN counts
      if (std::isnan(error)) return INFINITY;
    }
    return worst;
  }
};

#if defined(__SANITIZE_THREAD__)
// Every access takes some dozen times as long, and how threads share the work depends on none of these numbers.
constexpr int64_t kWindows[] = {-1, 64};
constexpr std::pair<int, int> kHeads[] = {{4, 1}, {6, 2}};
#else
constexpr int64_t kWindows[] = {-1, 0, 5, 64, 100};
constexpr std::pair<int, int> kHeads[] = {{4, 4}, {4, 1}, {16, 2}, {6, 2}};
#endif

void check_against_reference(const Kernels& kernels) {
  std::mt19937 random(1);
  const std::vector<Sequence> mixed = {{0, 1}, {130, 1}, {0, 70}, {63, 2}, {40, 90}, {7, 0}};
  for (const int64_t window : kWindows) {
    for (const auto& [heads, kv_heads] : kHeads) {
      for (const int dim : {16, 80, 128}) {
        Step step(random, 2, heads, kv_heads, dim, dim == 80 ? 32 : 16, window, mixed);
        step.write(kernels, 2);
        step.attend(kernels, 1);
        CHECK(step.worst_error() < 5e-6);  // outputs up to 4: some units in the last place, like any float32 sum
        const std::vector<float> alone = step.out;
        step.attend(kernels, 3);
        CHECK(step.out == alone);
      }
    }
  }
}

// Token by token gives the bits of one chunk.
void check_chunks(const Kernels& kernels) {
  std::mt19937 random(2);
  for (const int64_t window : {-1, 33}) {
    Step whole(random, 1, 3, 1, 48, 16, window, {{0, 150}});
    whole.write(kernels, 1);
    whole.attend(kernels, 1);
    Step part = whole;
    part.sequences = {{0, 1}};
    part.count = {1};
    for (int token = 0; token < 150; ++token) {
      part.first = {token};
      part.past = {token};
      part.attend(kernels, 1);
    }
    CHECK(part.out == whole.out);
  }
}

// A NaN reaches those who see it and nobody else.
void check_nan(const Kernels& kernels) {
  std::mt19937 random(3);
  for (const bool in_key : {true, false}) {
    Step step(random, 1, 1, 1, 16, 16, 20, {{0, 100}});
    (in_key ? step.key : step.value)[50 * 16 + 3] = NAN;
    step.write(kernels, 1);
    step.attend(kernels, 1);
    for (int token = 0; token < 100; ++token) {
      CHECK(std::isnan(step.out[token * 16 + 3]) == (token >= 50 && token <= 70));
    }
  }
}

void check_int8_heads(const Kernels& kernels) {
  std::vector<float> head(48);
  for (int i = 0; i < 48; ++i) head[i] = static_cast<float>(i - 20) * 0.37f;
  std::vector<int8_t> keys(48 * 16), values(48 * 16);
  float key_scales[16], value_scales[16];
  const int32_t table = 0;
  const attention::WriteTask task = {keys.data(), values.data(), key_scales,  value_scales, 0,  0, &table, 16,
                                     48,          head.data(),   head.data(), 48,           48, 1, 5};
  kernels.write[PT_FLOAT32][PT_KV_INT8](task);
  CHECK(value_scales[5] == 27 * 0.37f / 127.0f && key_scales[5] == value_scales[5]);
  for (int i = 0; i < 48; ++i) {
    CHECK(std::abs(static_cast<float>(values[5 * 48 + i]) * value_scales[5] - head[i]) <= value_scales[5] * 0.5001f);
    CHECK(keys[i * 16 + 5] == values[5 * 48 + i]);
  }
  std::fill(head.begin(), head.end(), 0.0f);
  kernels.write[PT_FLOAT32][PT_KV_INT8](task);
  CHECK(value_scales[5] == 0.0f && values[5 * 48] == 0);
  head[7] = INFINITY;
  kernels.write[PT_FLOAT32][PT_KV_INT8](task);
  CHECK(std::isnan(value_scales[5]));
}

void check_rows(const Kernels& kernels) {
  const float x[] = {3.0f, 4.0f}, gamma[] = {1.0f, 2.0f}, cos[] = {0.0f}, sin[] = {1.0f};
  float out[2];
  kernels.rms_norm[PT_FLOAT32][1](x, gamma, out, 2, 0.0f, false);
  const float inverse = 1.0f / std::sqrt(12.5f);
  CHECK(out[0] == 3.0f * inverse && out[1] == 4.0f * inverse * 2.0f);
  kernels.rms_norm[PT_FLOAT32][1](x, gamma, out, 2, 0.0f, true);
  CHECK(std::abs(out[0] - 3.0f / std::sqrt(36.5f)) < 1e-6f && std::abs(out[1] - 8.0f / std::sqrt(36.5f)) < 1e-6f);
  float head[] = {1.0f, 2.0f};
  kernels.rope[PT_FLOAT32](head, cos, sin, 2, true);
  CHECK(head[0] == -2.0f && head[1] == 1.0f);
  const float gates[] = {1.0f, -200.0f, 200.0f, INFINITY}, ups[] = {2.0f, 1.0f, 1.0f, 1.0f};
  float products[4];
  kernels.swiglu[PT_FLOAT32](gates, ups, products, 4);
  CHECK(std::abs(products[0] - 2.0f / (1.0f + std::exp(-1.0f))) < 1e-6f);
  CHECK(products[1] == 0.0f && products[2] == 200.0f && products[3] == INFINITY);
}

void check_refusals() {
  std::mt19937 random(4);
  Step step(random, 1, 2, 1, 16, 16, -1, {{20, 3}});
  pt_paged_kv cache = step.cache();
  pt_ragged_batch batch = step.batch();
  const pt_rows rows = Step::rows(step.query, 3, 32), out = Step::rows(step.out, 3, 32);
  const auto refused = [&](const char* part) {
    CHECK(pt_attention_attend(&cache, &batch, &rows, 2, -1, 0.25f, &out, 1) == PT_INVALID_ARGUMENT);
    CHECK_CONTAINS(pt_attention_last_error(), part);
    cache = step.cache();
    batch = step.batch();
  };
  CHECK(pt_attention_attend(&cache, &batch, &rows, 2, -1, 0.25f, &out, 1) == PT_OK);
  cache.head_dim = 24;
  refused("head_dim is 24, expected a multiple of 16");
  cache.block_tokens = 8;
  refused("block_tokens is 8, expected a multiple of 16");
  cache.dtype = PT_KV_INT8;
  refused("scales go with an int8 cache");
  batch.max_blocks = 1;
  refused("block table has 1 columns");
  batch.total_tokens = 2;
  refused("at most 2 tokens");
  const int32_t kept = step.table[0];
  step.table[0] = -1;
  refused("block_table[0, 0] is -1");
  CHECK(pt_attention_attend(&cache, &batch, &rows, 2, 4, 0.25f, &out, 1) == PT_OK);  // lies before the window
  step.table[0] = kept;
  CHECK(pt_attention_attend(&cache, &batch, &rows, 2, -1, NAN, &out, 1) == PT_INVALID_ARGUMENT);
  CHECK(pt_attention_attend(&cache, &batch, &rows, 2, -2, 1.0f, &out, 1) == PT_INVALID_ARGUMENT);
  CHECK(pt_attention_attend(&cache, &batch, &rows, 2, -1, 1.0f, &out, 0) == PT_INVALID_ARGUMENT);
}

}  // namespace

int main(int argc, char** argv) {
  CHECK(argc == 2);
  const Kernels* kernels = attention::kernels_named(argv[1]);
  if (kernels == nullptr) {
    std::printf("skipped: this processor or build has no %s\n", argv[1]);
    return testing::kSkip;
  }
  check_against_reference(*kernels);
  check_chunks(*kernels);
  check_nan(*kernels);
  check_int8_heads(*kernels);
  check_rows(*kernels);
  check_refusals();
}
