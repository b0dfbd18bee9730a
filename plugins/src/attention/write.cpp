// SPDX-License-Identifier: Apache-2.0
// Stores new keys (transposed) and values into their blocks. Compiled once per instruction set.
#include "attention/parts.h"
#include "attention/simd.h"

namespace pt::attention::PT_KERNELS_ISA {
namespace {

using numeric::bits_of;
using numeric::float_of;

// One head of one token as the cache's type.
template <typename Source, typename Target>
inline void convert(const typename Source::Storage* source, typename Target::Storage* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = Target::from_float(Source::to_float(source[i]));
}

template <typename Type>
inline void copy(const typename Type::Storage* source, typename Type::Storage* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = source[i];
}

// Returns the scale. A head that holds infinity or NaN reads back as NaN throughout.
template <typename Source>
float quantise(const typename Source::Storage* source, int8_t* target, int64_t count) {
  alignas(64) float values[PT_ATTENTION_MAX_HEAD_DIM];
  numeric::load_tile<Source>(source, values, static_cast<size_t>(count));
  uint32_t largest = 0;  // magnitudes order like their bits, and NaN comes last
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = bits_of(values[i]) & 0x7FFFFFFFu;
    largest = magnitude > largest ? magnitude : largest;
  }
  const bool finite = largest < 0x7F800000u;
  // Below that 127 / x would overflow; such a head counts as zero.
  const bool usable = finite && float_of(largest) > 1e-30f;
  const float inverse = usable ? 127.0f / float_of(largest) : 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float scaled = (finite ? values[i] : 0.0f) * inverse;
    // The low bits of 1.5 * 2^23 + x are x rounded to nearest even.
    target[i] = static_cast<int8_t>(bits_of(scaled + 12582912.0f) & 0xFFu);
  }
  return finite ? (usable ? float_of(largest) / 127.0f : 0.0f) : float_of(numeric::kQuietNan);
}

template <typename Element>
inline void scatter(const Element* source, Element* column, int64_t stride, int64_t count) {
  for (int64_t i = 0; i < count; ++i) column[i * stride] = source[i];
}

// Calls body(token, element offset of the block, position inside it, offset of the token's scale).
template <typename Body>
inline void for_each_token(const WriteTask& task, Body&& body) {
  for (int64_t token = 0; token < task.num_tokens; ++token) {
    const int64_t position = task.position + token, inside = position % task.block_tokens;
    const size_t block = static_cast<size_t>(task.table[position / task.block_tokens]);
    body(token, block * task.block_stride, inside, block * task.scale_block_stride + static_cast<size_t>(inside));
  }
}

template <typename Source, typename Target>
void write(const WriteTask& task) {
  using Storage = typename Target::Storage;
  const auto* keys = static_cast<const typename Source::Storage*>(task.key);
  const auto* values = static_cast<const typename Source::Storage*>(task.value);
  const int64_t dim = task.head_dim;
  for_each_token(task, [&](int64_t token, size_t block, int64_t inside, size_t) {
    Storage key[PT_ATTENTION_MAX_HEAD_DIM];
    Storage* value = static_cast<Storage*>(task.values) + block + inside * dim;
    const auto *from_key = keys + token * task.key_token_stride, *from_value = values + token * task.value_token_stride;
    if constexpr (__is_same(Source, Target)) {
      copy<Source>(from_key, key, dim);
      copy<Source>(from_value, value, dim);
    } else {
      convert<Source, Target>(from_key, key, dim);
      convert<Source, Target>(from_value, value, dim);
    }
    scatter(key, static_cast<Storage*>(task.keys) + block + inside, task.block_tokens, dim);
  });
}

template <typename Source>
void write_int8(const WriteTask& task) {
  const auto* keys = static_cast<const typename Source::Storage*>(task.key);
  const auto* values = static_cast<const typename Source::Storage*>(task.value);
  const int64_t dim = task.head_dim;
  for_each_token(task, [&](int64_t token, size_t block, int64_t inside, size_t scale) {
    int8_t key[PT_ATTENTION_MAX_HEAD_DIM];
    int8_t* value = static_cast<int8_t*>(task.values) + block + inside * dim;
    task.key_scales[scale] = quantise<Source>(keys + token * task.key_token_stride, key, dim);
    task.value_scales[scale] = quantise<Source>(values + token * task.value_token_stride, value, dim);
    scatter(key, static_cast<int8_t*>(task.keys) + block + inside, task.block_tokens, dim);
  });
}

}  // namespace

const WriteKernel kWrite[3][4] = {
    {write<Float32, Float32>, write<Float32, Bfloat16>, write<Float32, Float16>, write_int8<Float32>},
    {write<Bfloat16, Float32>, write<Bfloat16, Bfloat16>, write<Bfloat16, Float16>, write_int8<Bfloat16>},
    {write<Float16, Float32>, write<Float16, Bfloat16>, write<Float16, Float16>, write_int8<Float16>},
};

}  // namespace pt::attention::PT_KERNELS_ISA
