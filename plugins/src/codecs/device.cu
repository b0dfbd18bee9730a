// SPDX-License-Identifier: Apache-2.0
#include <cuda_fp16.h>

#include <algorithm>

#include "codecs/device.h"
#include "codecs/lane.cuh"

namespace pt::codecs {
namespace {

constexpr unsigned kThreads = 256;
constexpr size_t kMaxBlocks = 4096;

__device__ __forceinline__ float to_float(const float* source) { return *source; }
__device__ __forceinline__ float to_float(const __half* source) { return __half2float(*source); }
struct Bfloat16Bits {
  uint16_t bits;
};
__device__ __forceinline__ float to_float(const Bfloat16Bits* source) {
  return as_float(static_cast<uint32_t>(source->bits) << 16);
}

// Where the values of a lane lie in the matrix; `count` of its 8 are inside the row, none for a lane past the end.
struct LanePlace {
  size_t offset;
  int count;
};

template <typename Codec>
__device__ __forceinline__ LanePlace place_of(size_t lane, size_t rows, size_t hidden) {
  const size_t lanes_per_row = Layout<Codec>::groups_per_row(hidden) * Lane<Codec>::kLanes;
  const size_t row = lane / lanes_per_row, column = lane % lanes_per_row * kLaneValues;
  if (row >= rows || column >= hidden) return {0, 0};
  return {row * hidden + column, static_cast<int>(min(static_cast<size_t>(kLaneValues), hidden - column))};
}

template <typename Codec, typename Type>
__global__ void __launch_bounds__(kThreads) encode_kernel(const Type* __restrict__ x, const Type* __restrict__ base,
                                                          size_t rows, size_t hidden, uint8_t* __restrict__ encoded) {
  using Word = typename Lane<Codec>::Word;
  using Scale = typename Codec::Scale;
  const size_t groups = rows * Layout<Codec>::groups_per_row(hidden), lanes = groups * Lane<Codec>::kLanes;
  auto* words = reinterpret_cast<Word*>(encoded);
  auto* scales = reinterpret_cast<Scale*>(encoded + Layout<Codec>::scales_offset(groups));
  const size_t stride = static_cast<size_t>(gridDim.x) * kThreads;
  const size_t thread = static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x;
  // A whole warp stays in the loop while any of its lanes has a value: encoding needs all of them.
  for (size_t lane = thread; lane - threadIdx.x % 32 < lanes; lane += stride) {
    const LanePlace place = place_of<Codec>(lane, rows, hidden);
    float values[kLaneValues];
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      values[i] = i < place.count ? to_float(x + place.offset + i) : 0.0f;
      if (base != nullptr && i < place.count) values[i] = add(values[i], -to_float(base + place.offset + i));
    }
    Word word;
    const Scale scale = Lane<Codec>::encode(values, word);
    if (lane < lanes) words[lane] = word;
    if (lane < lanes && lane % Lane<Codec>::kLanes == 0) scales[lane / Lane<Codec>::kLanes] = scale;
  }
  const size_t used = groups * (Layout<Codec>::kCodeBytes + Layout<Codec>::kScaleBytes);
  if (thread < Layout<Codec>::encoded_bytes(groups) - used) encoded[used + thread] = 0;
}

template <typename Codec>
__global__ void __launch_bounds__(kThreads)
    decode_kernel(const uint8_t* __restrict__ encoded, size_t rows, size_t hidden, float* __restrict__ out) {
  const size_t groups = rows * Layout<Codec>::groups_per_row(hidden), lanes = groups * Lane<Codec>::kLanes;
  const auto* words = reinterpret_cast<const typename Lane<Codec>::Word*>(encoded);
  const auto* scales = reinterpret_cast<const typename Codec::Scale*>(encoded + Layout<Codec>::scales_offset(groups));
  const size_t stride = static_cast<size_t>(gridDim.x) * kThreads;
  for (size_t lane = static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x; lane < lanes; lane += stride) {
    const LanePlace place = place_of<Codec>(lane, rows, hidden);
    float values[kLaneValues];
    Lane<Codec>::decode(words[lane], scales[lane / Lane<Codec>::kLanes], values);
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      if (i < place.count) out[place.offset + i] = values[i];
    }
  }
}

template <typename Codec>
unsigned blocks_for(size_t rows, size_t hidden) {
  const size_t lanes = rows * Layout<Codec>::groups_per_row(hidden) * Lane<Codec>::kLanes;
  return static_cast<unsigned>(std::min(kMaxBlocks, (lanes + kThreads - 1) / kThreads));
}

template <typename Codec, typename Type>
void launch_encode(const void* x, const void* base, size_t rows, size_t hidden, void* encoded, cudaStream_t stream) {
  encode_kernel<Codec, Type><<<blocks_for<Codec>(rows, hidden), kThreads, 0, stream>>>(
      static_cast<const Type*>(x), static_cast<const Type*>(base), rows, hidden, static_cast<uint8_t*>(encoded));
}

}  // namespace

cudaError_t encode_on_device(int codec, const void* x, const void* base, int dtype, size_t rows, size_t hidden,
                             void* encoded, cudaStream_t stream) noexcept {
  if (hidden == 0 || dtype < PT_FLOAT32 || dtype > PT_FLOAT16) return cudaErrorInvalidValue;
  const bool known = with_codec(codec, [&](auto chosen) {
    using Codec = decltype(chosen);
    if (rows == 0) return;
    if (dtype == PT_FLOAT32) launch_encode<Codec, float>(x, base, rows, hidden, encoded, stream);
    if (dtype == PT_BFLOAT16) launch_encode<Codec, Bfloat16Bits>(x, base, rows, hidden, encoded, stream);
    if (dtype == PT_FLOAT16) launch_encode<Codec, __half>(x, base, rows, hidden, encoded, stream);
  });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}

cudaError_t decode_on_device(int codec, const void* encoded, size_t rows, size_t hidden, float* values,
                             cudaStream_t stream) noexcept {
  if (hidden == 0) return cudaErrorInvalidValue;
  const bool known = with_codec(codec, [&](auto chosen) {
    using Codec = decltype(chosen);
    if (rows == 0) return;
    decode_kernel<Codec><<<blocks_for<Codec>(rows, hidden), kThreads, 0, stream>>>(static_cast<const uint8_t*>(encoded),
                                                                                   rows, hidden, values);
  });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}

}  // namespace pt::codecs
