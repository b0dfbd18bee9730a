// SPDX-License-Identifier: Apache-2.0
// What a protocol is given: the channel it runs on and the message, cut into rows of whole vectors.
#pragma once

#include "cuda_fusion/layout.h"

namespace pt::cuda_fusion {

// One rank's end. Plain data: kernels get it by value.
struct Channel {
  unsigned char* workspaces[kMaxRanks];  // of all ranks, own included, as this rank addresses them
  Vector* replica;                       // own copy of the multicast memory; null: the channel has none
  void* multicast;                       // of all copies at once, for multimem instructions: see nvls.h
  Control* control;
  Record* record;
  Layout layout;
  uint32_t rank;
  uint32_t size;
  uint64_t timeout_ns;  // of one wait without progress; 0: none
  bool strict;          // fences that public implementations of the one-shot protocol leave out

  template <typename Object>
  PT_HOST_DEVICE Object* at(uint32_t owner, uint64_t offset) const {
    return reinterpret_cast<Object*>(workspaces[owner] + offset);
  }
  PT_HOST_DEVICE Header* header(uint32_t owner) const { return at<Header>(owner, 0); }
};

// With RMSNorm a row is a token. Without it the tensor is cut into rows of kFlatVectors, the last one may be shorter.
constexpr uint32_t kFlatVectors = 256;
// Elements that a warp encodes at once. Slices of encoded rows are multiples of it: they share no group, and no word of
// scales.
constexpr uint32_t kEncodedAtOnce = 256;

struct Call {
  const void* x;
  const void* residual;  // null: none
  void* h;
  const void* gamma;  // [num_gammas, row_elements]
  void* norm_out;     // [num_gammas, elements]
  uint64_t elements;
  uint64_t rows;
  uint64_t row_elements;
  uint32_t row_vectors;     // of a row in transit, encoded or not, rounded up
  uint32_t slice_elements;  // of two-shot: what a rank owns of a row
  uint32_t slice_vectors;   // the same in transit, where a slice is a row of its own
  uint32_t num_gammas;
  uint64_t piece_rows;  // of pull, two-shot and nvls: what one pass over the staging memory carries
  uint32_t num_pieces;
  float scale;
  float eps;
  bool gamma_is_float;
  bool delta;    // coded payloads only: x - residual travels
  bool aligned;  // every row of every tensor starts on 16 bytes and is whole vectors

  PT_HOST_DEVICE uint64_t elements_in(uint64_t row) const {
    const uint64_t rest = elements - row * row_elements;
    return rest < row_elements ? rest : row_elements;
  }
  template <typename Type>
  PT_HOST_DEVICE uint32_t vectors_in(uint64_t row) const {
    return static_cast<uint32_t>((elements_in(row) + kPerVector<Type> - 1) / kPerVector<Type>);
  }
  // For packets of a slice.
  PT_HOST_DEVICE Call of_slices() const {
    Call slices = *this;
    slices.row_elements = slice_elements;
    return slices;
  }
};

}  // namespace pt::cuda_fusion
