// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set with PT_KERNELS_ISA = baseline, avx2 or avx512 and -ffp-contract=off: the order of
// operations is fixed by the source, so every variant gives the same bits.
#include "track_fusion/kernels.h"

#include "common/numeric.h"

#define PT_STRING_OF(text) #text
#define PT_STRING(text) PT_STRING_OF(text)

namespace pt::track_fusion::PT_KERNELS_ISA {
namespace {

using namespace numeric;

// A tile of fp32 stays in the first-level cache beside the sources it is made of.
constexpr size_t kTile = 256;
constexpr size_t kNormLanes = 16;

inline size_t tile_size(size_t done, size_t count) { return count - done < kTile ? count - done : kTile; }

template <typename Type>
inline void sum_tile(const void* const* sources, int size, float scale, size_t offset, float* values, size_t count) {
  using Storage = typename Type::Storage;
  load_tile<Type>(static_cast<const Storage*>(sources[0]) + offset, values, count);
  for (int rank = 1; rank < size; ++rank) {
    add_tile<Type>(static_cast<const Storage*>(sources[rank]) + offset, values, count);
  }
  for (size_t i = 0; i < count; ++i) values[i] *= scale;
}

template <typename Type>
void reduce(const void* const* sources, int size, const void* residual, float scale, void* out, size_t count) {
  using Storage = typename Type::Storage;
  alignas(64) float values[kTile];
  for (size_t done = 0; done < count; done += kTile) {
    const size_t width = tile_size(done, count);
    sum_tile<Type>(sources, size, scale, done, values, width);
    if (residual != nullptr) add_tile<Type>(static_cast<const Storage*>(residual) + done, values, width);
    store_tile<Type>(values, static_cast<Storage*>(out) + done, width);
  }
}

template <typename Type>
void reduce_to_float(const void* const* sources, int size, float scale, float* out, size_t count) {
  alignas(64) float values[kTile];
  for (size_t done = 0; done < count; done += kTile) {
    const size_t width = tile_size(done, count);
    sum_tile<Type>(sources, size, scale, done, values, width);
    store_tile<Float32>(values, static_cast<AnyFloat*>(out) + done, width);
  }
}

template <typename Type>
void add_residual(const float* mean, const void* residual, void* out, size_t count) {
  using Storage = typename Type::Storage;
  alignas(64) float values[kTile];
  for (size_t done = 0; done < count; done += kTile) {
    const size_t width = tile_size(done, count);
    load_tile<Float32>(static_cast<const AnyFloat*>(mean) + done, values, width);
    add_tile<Type>(static_cast<const Storage*>(residual) + done, values, width);
    store_tile<Type>(values, static_cast<Storage*>(out) + done, width);
  }
}

// Element i goes to lane i % 16; lanes fold 8, 4, 2, 1. Depends on `hidden` only.
template <typename Type>
float sum_of_squares(const typename Type::Storage* row, size_t hidden) {
  alignas(64) float lanes[kNormLanes] = {};
  alignas(64) float values[kTile];
  for (size_t done = 0; done < hidden; done += kTile) {
    const size_t width = tile_size(done, hidden);
    load_tile<Type>(row + done, values, width);
    const size_t padded = (width + kNormLanes - 1) / kNormLanes * kNormLanes;
    for (size_t i = width; i < padded; ++i) values[i] = 0.0f;  // adds +0: same bits as leaving the lane out
    for (size_t i = 0; i < padded; i += kNormLanes) {
      for (size_t lane = 0; lane < kNormLanes; ++lane) lanes[lane] += values[i + lane] * values[i + lane];
    }
  }
  for (size_t half = kNormLanes / 2; half > 0; half /= 2) {
    for (size_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

template <typename Type, typename GammaType>
void rms_norm(const void* h, const void* gamma, size_t num_gammas, float eps, void* out, size_t out_gamma_stride,
              size_t rows, size_t hidden) {
  using Storage = typename Type::Storage;
  alignas(64) float values[kTile];
  alignas(64) float weights[kTile];
  for (size_t row = 0; row < rows; ++row) {
    const Storage* source = static_cast<const Storage*>(h) + row * hidden;
    const float mean_square = sum_of_squares<Type>(source, hidden) / static_cast<float>(hidden);
    const float inverse = 1.0f / __builtin_sqrtf(mean_square + eps);
    for (size_t g = 0; g < num_gammas; ++g) {
      const auto* weight = static_cast<const typename GammaType::Storage*>(gamma) + g * hidden;
      Storage* target = static_cast<Storage*>(out) + g * out_gamma_stride + row * hidden;
      for (size_t done = 0; done < hidden; done += kTile) {
        const size_t width = tile_size(done, hidden);
        load_tile<Type>(source + done, values, width);
        load_tile<GammaType>(weight + done, weights, width);
        for (size_t i = 0; i < width; ++i) values[i] = (values[i] * inverse) * weights[i];
        store_tile<Type>(values, target + done, width);
      }
    }
  }
}

}  // namespace

const Kernels kKernels = {
    PT_STRING(PT_KERNELS_ISA),
    {reduce<Float32>, reduce<Bfloat16>, reduce<Float16>},
    {reduce_to_float<Float32>, reduce_to_float<Bfloat16>, reduce_to_float<Float16>},
    {add_residual<Float32>, add_residual<Bfloat16>, add_residual<Float16>},
    {{rms_norm<Float32, Float32>, rms_norm<Float32, Float32>},
     {rms_norm<Bfloat16, Bfloat16>, rms_norm<Bfloat16, Float32>},
     {rms_norm<Float16, Float16>, rms_norm<Float16, Float32>}},
};

}  // namespace pt::track_fusion::PT_KERNELS_ISA
