// SPDX-License-Identifier: Apache-2.0
#include "linear/linear.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>

#include "common/pool.h"
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#include "common/numeric.h"
#pragma GCC diagnostic pop

namespace pt::linear {
namespace {

using namespace numeric;

// Outputs of one piece of work at most: its sums stay in the first-level cache.
constexpr size_t kMaxPieceOutputs = 16 * kTileOutputs;
// Enough pieces that threads of different speed end together.
constexpr size_t kPiecesPerThread = 16;
// Below so many products (some 10 us of one thread) a second thread saves less than it may cost: handing over takes 2
// us, and on a busy machine the caller waits for a thread that has taken a piece and then lost its core.
constexpr size_t kWorthAThread = size_t{1} << 17;

// The calling thread's memory for operands; grows, and is reused by the next call.
class Workspace {
 public:
  void* reserve(size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

template <typename Type>
void store_row(const float* sums, const void* bias, size_t output, void* y, size_t at, size_t count) {
  using Storage = typename Type::Storage;
  float values[kMaxPieceOutputs];
  for (size_t i = 0; i < count; ++i) values[i] = sums[i];
  if (bias != nullptr) {
    for (size_t i = 0; i < count; ++i) values[i] += Type::to_float(static_cast<const Storage*>(bias)[output + i]);
  }
  store_tile<Type>(values, static_cast<Storage*>(y) + at, count);
}

void store_row(int dtype, const float* sums, const void* bias, size_t output, void* y, size_t at, size_t count) {
  switch (static_cast<pt_linear_dtype>(dtype)) {
    case PT_LINEAR_X_FLOAT32:
      return store_row<Float32>(sums, bias, output, y, at, count);
    case PT_LINEAR_X_BFLOAT16:
      return store_row<Bfloat16>(sums, bias, output, y, at, count);
    case PT_LINEAR_X_FLOAT16:
      return store_row<Float16>(sums, bias, output, y, at, count);
  }
}

// One pass over the weights for at most kMaxOperandRows operand rows.
struct Pass {
  const Kernels& kernels;
  const Product& product;
  const void* operand;
  size_t first_row, rows, terms, piece_outputs;

  using Sums = float[kMaxOperandRows][kMaxPieceOutputs];

  // sums[row] for real rows: the terms of a row are added.
  void multiply(const pt_linear_weight* weight, size_t first, size_t last, Sums& sums) const {
    kernels.multiply(weight, operand, rows * terms, first, last, sums[0], kMaxPieceOutputs);
    if (terms == 1) return;
    for (size_t row = 0; row < rows; ++row) {
      for (size_t i = 0; i < last - first; ++i) sums[row][i] = sums[2 * row][i] + sums[2 * row + 1][i];
    }
  }

  void run(uint32_t piece) const {
    const size_t num_outputs = product.weight->out, first = piece * piece_outputs;
    const size_t last = std::min(first + piece_outputs, num_outputs);
    Sums sums, up;
    multiply(product.weight, first, last, sums);
    if (product.up != nullptr) {
      multiply(product.up, first, last, up);
      for (size_t row = 0; row < rows; ++row) {
        for (size_t i = 0; i < last - first; ++i) {
          sums[row][i] = sums[row][i] / (1.0f + std::exp(-sums[row][i])) * up[row][i];
        }
      }
    }
    for (size_t row = 0; row < rows; ++row) {
      const size_t at = (first_row + row) * num_outputs + first;
      store_row(product.dtype, sums[row], product.bias, first, product.y, at, last - first);
    }
  }
};

size_t choose_piece_outputs(size_t num_outputs, int threads) {
  if (threads == 1) return kMaxPieceOutputs;
  const size_t even = num_outputs / (kPiecesPerThread * static_cast<size_t>(threads));
  return std::clamp(even / kTileOutputs * kTileOutputs, kTileOutputs, kMaxPieceOutputs);
}

}  // namespace

void run_product(const Kernels& kernels, const Product& product, int num_threads) {
  thread_local Workspace workspace;
  const pt_linear_weight& weight = *product.weight;
  const int threads = product.rows * weight.out * weight.in < kWorthAThread ? 1 : num_threads;
  const size_t terms = weight.kind >= PT_LINEAR_INT8 && product.dtype == PT_LINEAR_X_FLOAT32 ? 2 : 1;
  const size_t max_rows = kMaxOperandRows / terms, x_bytes = product.dtype == PT_LINEAR_X_FLOAT32 ? 4 : 2;
  const size_t piece_outputs = choose_piece_outputs(weight.out, threads);
  const auto pieces = static_cast<uint32_t>((weight.out + piece_outputs - 1) / piece_outputs);
  for (size_t first = 0; first < product.rows; first += max_rows) {
    const size_t rows = std::min(max_rows, product.rows - first);
    void* const operand = workspace.reserve(kernels.operand_bytes(&weight, rows * terms));
    const char* x = static_cast<const char*>(product.x) + first * weight.in * x_bytes;
    kernels.prepare(&weight, x, product.dtype, rows, terms, operand);
    Pass pass{kernels, product, operand, first, rows, terms, piece_outputs};
    const auto run = [](void* context, int, uint32_t piece) { static_cast<const Pass*>(context)->run(piece); };
    Pool::shared().run(run, &pass, pieces, threads);
  }
}

}  // namespace pt::linear
