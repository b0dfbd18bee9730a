// SPDX-License-Identifier: Apache-2.0
// A rank's own tensors: reading a vector of x, finishing a row of h and its norms.
#pragma once

#include "cuda_fusion/call.h"

namespace pt::cuda_fusion {
namespace {

// Vector `c` of a row of `tensor`; elements past the end of the row are 0.
template <typename Type>
PT_HOST_DEVICE Vector load_vector(const Call& call, const void* tensor, uint64_t row, uint32_t c) {
  const auto* from = static_cast<const typename Type::Storage*>(tensor) + row * call.row_elements;
  const uint64_t first = static_cast<uint64_t>(c) * kPerVector<Type>;
  if (call.aligned) return *reinterpret_cast<const Vector*>(from + first);
  Vector v = filled(0);
  const uint64_t end = call.elements_in(row);
  for (int i = 0; i < kPerVector<Type>; ++i) {
    if (first + i < end) put_stored<Type>(v, i, from[first + i]);
  }
  return v;
}

template <typename Type>
PT_HOST_DEVICE void store_vector(const Call& call, void* tensor, uint64_t row, uint32_t c, const Vector& v) {
  auto* to = static_cast<typename Type::Storage*>(tensor) + row * call.row_elements;
  const uint64_t first = static_cast<uint64_t>(c) * kPerVector<Type>;
  if (call.aligned) {
    *reinterpret_cast<Vector*>(to + first) = v;
    return;
  }
  const uint64_t end = call.elements_in(row);
  for (int i = 0; i < kPerVector<Type>; ++i) {
    if (first + i < end) to[first + i] = stored<Type>(v, i);
  }
}

// Rounds a vector of h = scale * sum (+ residual), stores it, and returns the sum of its squares.
template <typename Type>
PT_HOST_DEVICE float store_h(const Call& call, uint64_t row, uint32_t c, const Vector& h) {
  store_vector<Type>(call, call.h, row, c, h);
  float squares = 0.0f;
  for (int i = 0; i < kPerVector<Type>; ++i) {
    const float value = element<Type>(h, i);
    squares = add(squares, multiply(value, value));
  }
  return squares;
}

template <typename Type>
PT_HOST_DEVICE Vector finish_sum(const Call& call, uint64_t row, uint32_t c, float* sums) {
  for (int i = 0; i < kPerVector<Type>; ++i) sums[i] = multiply(sums[i], call.scale);
  if (call.residual != nullptr) {
    const Vector residual = load_vector<Type>(call, call.residual, row, c);
    for (int i = 0; i < kPerVector<Type>; ++i) sums[i] = add(sums[i], element<Type>(residual, i));
  }
  return packed<Type>(sums);
}

template <typename Type>
PT_HOST_DEVICE float gamma_at(const Call& call, uint64_t index) {
  if (call.gamma_is_float) return static_cast<const float*>(call.gamma)[index];
  return Type::to_float(static_cast<const typename Type::Storage*>(call.gamma)[index]);
}

// Norms of a row whose vectors of h this team's threads have just stored, each thread its own. `squares`: the thread's
// part of their sum. The whole team calls it, with the shape of the sum depending on the row's length only.
template <typename Type, typename Team>
PT_HOST_DEVICE void norm_row(const Call& call, Team& team, uint64_t row, float squares) {
  const float sum = team.sum(squares);
  const float inverse = inverse_root_mean(sum, static_cast<float>(call.row_elements), call.eps);
  for (uint32_t g = 0; g < call.num_gammas; ++g) {
    auto* out = static_cast<typename Type::Storage*>(call.norm_out) + g * call.elements;
    for (uint32_t c = team.thread(); c < call.vectors_in<Type>(row); c += team.size()) {
      const Vector h = load_vector<Type>(call, call.h, row, c);
      float values[kPerVector<Type>];
      for (int i = 0; i < kPerVector<Type>; ++i) {
        const uint64_t column = static_cast<uint64_t>(c) * kPerVector<Type> + i;
        const float gamma = column < call.row_elements ? gamma_at<Type>(call, g * call.row_elements + column) : 0.0f;
        values[i] = multiply(multiply(element<Type>(h, i), inverse), gamma);
      }
      store_vector<Type>(call, out, row, c, packed<Type>(values));
    }
  }
}

// Adds a vector to the sums; the caller goes through ranks in order.
template <typename Type>
PT_HOST_DEVICE void accumulate(float* sums, const Vector& v) {
  for (int i = 0; i < kPerVector<Type>; ++i) sums[i] = add(sums[i], element<Type>(v, i));
}

template <typename Type>
PT_HOST_DEVICE void start(float* sums, const Vector& v) {
  for (int i = 0; i < kPerVector<Type>; ++i) sums[i] = element<Type>(v, i);
}

}  // namespace
}  // namespace pt::cuda_fusion
