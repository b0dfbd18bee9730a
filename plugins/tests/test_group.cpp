// SPDX-License-Identifier: Apache-2.0
// Collectives with threads as ranks. Run it under ThreadSanitizer with -DPT_SANITIZE=thread.
#include <cstring>
#include <numeric>
#include <random>

#include "check.h"

using namespace pt;
using namespace pt::track_fusion;

namespace {

float value_of(int rank, size_t i) { return static_cast<float>(static_cast<int>(i * 7 % 23) - 11 + 3 * rank); }

void one_operation(Group& group, int rank, int size, unsigned kind, size_t count) {
  const int root = static_cast<int>(count % static_cast<size_t>(size));
  std::vector<float> x(count), out(count * static_cast<size_t>(size));
  for (size_t i = 0; i < count; ++i) x[i] = value_of(rank, i);
  switch (kind) {
    case 0: {
      group.all_reduce(x.data(), out.data(), count, PT_FLOAT32, -1);
      for (size_t i = 0; i < count; ++i) {
        float expected = 0;
        for (int other = 0; other < size; ++other) expected += value_of(other, i);
        CHECK(out[i] == expected);
      }
      break;
    }
    case 1: {
      group.broadcast(x.data(), count * 4, root, -1);
      for (size_t i = 0; i < count; ++i) CHECK(x[i] == value_of(root, i));
      break;
    }
    case 2: {
      group.gather(x.data(), 1, count * 4, out.data(), root, -1);
      if (rank != root) break;
      for (int other = 0; other < size; ++other) {
        for (size_t i = 0; i < count; ++i) CHECK(out[static_cast<size_t>(other) * count + i] == value_of(other, i));
      }
      break;
    }
    case 3: {
      std::vector<float> residual(count, 0.5f);
      group.fuse(
          {x.data(), residual.data(), out.data(), 1, count, PT_FLOAT32, PT_MEAN, nullptr, 0, PT_FLOAT32, 0, nullptr},
          -1);
      for (size_t i = 0; i < count; ++i) {
        float sum = 0;
        for (int other = 0; other < size; ++other) sum += value_of(other, i);
        CHECK(out[i] == sum * (1.0f / static_cast<float>(size)) + 0.5f);
      }
      break;
    }
    default:
      group.barrier(-1);
  }
}

// More steps than kFirstEpoch is away from the wrap of the counter.
void mixed_operations_agree(int size, int calls) {
  testing::run_ranks(size, 4096, 60.0, [&](Group& group, int rank) {
    std::mt19937 random(11);
    for (int call = 0; call < calls; ++call) {
      const unsigned kind = static_cast<unsigned>(random() % 5);
      const size_t sizes[] = {0, 1, 3, 64, 1000, 1024, 1025, 20000};
      const size_t count = sizes[random() % std::size(sizes)];
      one_operation(group, rank, size, kind, kind == 3 && count == 0 ? 1 : count);
    }
  });
}

void gathered_rows_are_side_by_side() {
  testing::run_ranks(3, 4096, 60.0, [](Group& group, int rank) {
    const size_t rows = 5, columns = 2001;  // rows are cut by the capacity in the middle
    std::vector<uint8_t> mine(rows * columns, static_cast<uint8_t>(rank + 1)), all(rows * columns * 3);
    group.gather(mine.data(), rows, columns, all.data(), 1, -1);
    if (rank != 1) return;
    for (size_t i = 0; i < all.size(); ++i) CHECK(all[i] == i % (3 * columns) / columns + 1);
  });
}

void fuse_may_run_in_place() {
  testing::run_ranks(4, 65536, 60.0, [](Group& group, int rank) {
    for (const size_t count : {100u, 50000u}) {  // one-shot and two-phase
      std::vector<float> x(count, static_cast<float>(rank));
      group.all_reduce(x.data(), x.data(), count, PT_FLOAT32, -1);
      for (const float value : x) CHECK(value == 6.0f);
    }
  });
}

}  // namespace

int main() {
  for (const int size : {1, 2, 3, 4}) mixed_operations_agree(size, 400);
  gathered_rows_are_side_by_side();
  fuse_may_run_in_place();
}
