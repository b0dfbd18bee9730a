// SPDX-License-Identifier: Apache-2.0
// RMSNorm, rotation and SwiGLU of one row, and the table of this instruction set. Compiled once per instruction set.
#include "attention/parts.h"
#include "attention/simd.h"

#define PT_STRING_OF(text) #text
#define PT_STRING(text) PT_STRING_OF(text)

namespace pt::attention::PT_KERNELS_ISA {
namespace {

using numeric::load_tile;
using numeric::store_tile;

constexpr size_t kTile = 256;  // floats that stay in the first-level cache
constexpr size_t kLanesOfSquares = 16;

inline size_t tile_size(size_t done, size_t count) { return count - done < kTile ? count - done : kTile; }

// The tile at `done` as floats, times the weight where it comes before the norm.
template <typename Type, typename WeightType>
inline void load_weighted(const typename Type::Storage* source, const typename WeightType::Storage* weight, size_t done,
                          size_t width, bool scaled, float* values) {
  load_tile<Type>(source + done, values, width);
  if (!scaled) return;
  alignas(64) float weights[kTile];
  load_tile<WeightType>(weight + done, weights, width);
  for (size_t i = 0; i < width; ++i) values[i] *= weights[i];
}

template <typename Type, typename WeightType>
void rms_norm(const void* x, const void* weight_data, void* out, size_t width, float eps, bool pre_scale) {
  const auto* source = static_cast<const typename Type::Storage*>(x);
  const auto* weight = static_cast<const typename WeightType::Storage*>(weight_data);
  auto* target = static_cast<typename Type::Storage*>(out);
  const bool before = weight != nullptr && pre_scale, after = weight != nullptr && !pre_scale;
  alignas(64) float values[kTile];
  // Element i goes to lane i % 16; lanes fold 8, 4, 2, 1.
  alignas(64) float lanes[kLanesOfSquares] = {};
  for (size_t done = 0; done < width; done += kTile) {
    const size_t here = tile_size(done, width);
    load_weighted<Type, WeightType>(source, weight, done, here, before, values);
    const size_t padded = (here + kLanesOfSquares - 1) / kLanesOfSquares * kLanesOfSquares;
    for (size_t i = here; i < padded; ++i) values[i] = 0.0f;
    for (size_t i = 0; i < padded; i += kLanesOfSquares) {
      for (size_t lane = 0; lane < kLanesOfSquares; ++lane) lanes[lane] += values[i + lane] * values[i + lane];
    }
  }
  for (size_t half = kLanesOfSquares / 2; half > 0; half /= 2) {
    for (size_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  const float inverse = 1.0f / __builtin_sqrtf(lanes[0] / static_cast<float>(width) + eps);
  for (size_t done = 0; done < width; done += kTile) {
    const size_t here = tile_size(done, width);
    load_weighted<Type, WeightType>(source, weight, done, here, before, values);
    for (size_t i = 0; i < here; ++i) values[i] *= inverse;
    if (after) {
      alignas(64) float weights[kTile];
      load_tile<WeightType>(weight + done, weights, here);
      for (size_t i = 0; i < here; ++i) values[i] *= weights[i];
    }
    store_tile<Type>(values, target + done, here);
  }
}

// Pairs are neighbours or the two halves of the head. Two products and a sum, each rounded, like separate operations.
template <typename Type>
void rope(void* head, const float* cos, const float* sin, size_t head_dim, bool interleaved) {
  auto* data = static_cast<typename Type::Storage*>(head);
  alignas(64) float values[PT_ATTENTION_MAX_HEAD_DIM];
  alignas(64) float rotated[PT_ATTENTION_MAX_HEAD_DIM];
  const size_t half = head_dim / 2;
  load_tile<Type>(data, values, head_dim);
  if (interleaved) {
    for (size_t i = 0; i < half; ++i) {
      rotated[2 * i] = values[2 * i] * cos[i] - values[2 * i + 1] * sin[i];
      rotated[2 * i + 1] = values[2 * i + 1] * cos[i] + values[2 * i] * sin[i];
    }
  } else {
    for (size_t i = 0; i < half; ++i) rotated[i] = values[i] * cos[i] - values[half + i] * sin[i];
    for (size_t i = 0; i < half; ++i) rotated[half + i] = values[half + i] * cos[i] + values[i] * sin[i];
  }
  store_tile<Type>(rotated, data, head_dim);
}

template <typename Type>
void add(const void* x_data, const void* y_data, void* out, size_t width) {
  const auto* x = static_cast<const typename Type::Storage*>(x_data);
  const auto* y = static_cast<const typename Type::Storage*>(y_data);
  auto* target = static_cast<typename Type::Storage*>(out);
  alignas(64) float left[kTile];
  alignas(64) float right[kTile];
  for (size_t done = 0; done < width; done += kTile) {
    const size_t here = tile_size(done, width);
    load_tile<Type>(x + done, left, here);
    load_tile<Type>(y + done, right, here);
    for (size_t i = 0; i < here; ++i) left[i] += right[i];
    store_tile<Type>(left, target + done, here);
  }
}

template <typename Type>
void swiglu(const void* gate_data, const void* up_data, void* out, size_t width) {
  const auto* gate = static_cast<const typename Type::Storage*>(gate_data);
  const auto* up = static_cast<const typename Type::Storage*>(up_data);
  auto* target = static_cast<typename Type::Storage*>(out);
  alignas(64) float gates[kTile];
  alignas(64) float ups[kTile];
  typename Type::Storage rounded[kTile];
  for (size_t done = 0; done < width; done += kTile) {
    const size_t here = tile_size(done, width);
    load_tile<Type>(gate + done, gates, here);
    const size_t padded = (here + kLanes - 1) / kLanes * kLanes;
    for (size_t i = here; i < padded; ++i) gates[i] = 0.0f;
    for (size_t i = 0; i < padded; i += kLanes) {
      const Vec x = load(gates + i);
      store(gates + i, x / (all(1.0f) + exp2(x * all(-1.44269504088896341f))));
    }
    store_tile<Type>(gates, rounded, here);
    load_tile<Type>(rounded, gates, here);
    load_tile<Type>(up + done, ups, here);
    for (size_t i = 0; i < here; ++i) gates[i] *= ups[i];
    store_tile<Type>(gates, target + done, here);
  }
}

}  // namespace

constinit const Kernels kKernels = {
    PT_STRING(PT_KERNELS_ISA),
    kAttend,
    kWrite,
    {{rms_norm<Float32, Float32>, rms_norm<Float32, Float32>},
     {rms_norm<Bfloat16, Bfloat16>, rms_norm<Bfloat16, Float32>},
     {rms_norm<Float16, Float16>, rms_norm<Float16, Float32>}},
    {rope<Float32>, rope<Bfloat16>, rope<Float16>},
    {add<Float32>, add<Bfloat16>, add<Float16>},
    {swiglu<Float32>, swiglu<Bfloat16>, swiglu<Float16>},
};

}  // namespace pt::attention::PT_KERNELS_ISA
