// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set with PT_KERNELS_ISA = baseline, avx2 or avx512 and -ffp-contract=off, like the
// kernels of track fusion: every variant gives the same bits.
#include "codecs/kernels.h"

#include "codecs/group.h"
#include "common/numeric.h"

#define PT_STRING_OF(text) #text
#define PT_STRING(text) PT_STRING_OF(text)

namespace pt::codecs::PT_KERNELS_ISA {
namespace {

using numeric::Bfloat16;
using numeric::Float16;
using numeric::Float32;

// Walks the groups of a range: where each starts in its matrix, and how many of its values are inside the row.
template <typename Codec>
class Cursor {
 public:
  explicit Cursor(const GroupRange& range) : hidden_(range.hidden) {
    const size_t per_row = Layout<Codec>::groups_per_row(hidden_);
    row_begin_ = range.first / per_row * hidden_;
    column_ = range.first % per_row * Codec::kGroup;
  }
  size_t offset() const { return row_begin_ + column_; }
  size_t width() const { return hidden_ - column_ < Codec::kGroup ? hidden_ - column_ : Codec::kGroup; }
  void advance() {
    column_ += Codec::kGroup;
    if (column_ < hidden_) return;
    column_ = 0;
    row_begin_ += hidden_;
  }

 private:
  size_t hidden_, row_begin_, column_;
};

// The full width as a constant: the loops of nearly every group have a fixed length.
template <typename Codec, typename Type>
inline void load_group(const typename Type::Storage* source, size_t width, float* values) {
  if (width == Codec::kGroup) {
    numeric::load_tile<Type>(source, values, Codec::kGroup);
    return;
  }
  numeric::load_tile<Type>(source, values, width);
  for (size_t i = width; i < Codec::kGroup; ++i) values[i] = 0.0f;
}

template <typename Codec, typename Type>
inline void store_group(const float* values, size_t width, typename Type::Storage* target) {
  if (width == Codec::kGroup) {
    numeric::store_tile<Type>(values, target, Codec::kGroup);
  } else {
    numeric::store_tile<Type>(values, target, width);
  }
}

template <typename Codec, typename Type>
void encode(const void* x, const void* base, GroupRange range, Encoded target) {
  using Storage = typename Type::Storage;
  alignas(64) float values[Codec::kGroup], known[Codec::kGroup];
  Cursor<Codec> cursor(range);
  for (size_t group = 0; group < range.count; ++group, cursor.advance()) {
    load_group<Codec, Type>(static_cast<const Storage*>(x) + cursor.offset(), cursor.width(), values);
    if (base != nullptr) {
      load_group<Codec, Type>(static_cast<const Storage*>(base) + cursor.offset(), cursor.width(), known);
      for (size_t i = 0; i < Codec::kGroup; ++i) values[i] -= known[i];
    }
    encode_group<Codec>(values, target.codes + group * Layout<Codec>::kCodeBytes,
                        target.scales + group * Layout<Codec>::kScaleBytes);
  }
}

template <typename Codec>
inline void sum_group(const ConstEncoded* sources, int size, float scale, size_t group, float* sum) {
  alignas(64) float values[Codec::kGroup];
  const size_t codes = group * Layout<Codec>::kCodeBytes, scales = group * Layout<Codec>::kScaleBytes;
  decode_group<Codec>(sources[0].codes + codes, sources[0].scales + scales, sum);
  for (int rank = 1; rank < size; ++rank) {
    decode_group<Codec>(sources[rank].codes + codes, sources[rank].scales + scales, values);
    for (size_t i = 0; i < Codec::kGroup; ++i) sum[i] += values[i];
  }
  for (size_t i = 0; i < Codec::kGroup; ++i) sum[i] *= scale;
}

template <typename Codec, typename Type>
void reduce(const ConstEncoded* sources, int size, const void* residual, float scale, void* out, GroupRange range) {
  using Storage = typename Type::Storage;
  alignas(64) float sum[Codec::kGroup];
  Cursor<Codec> cursor(range);
  for (size_t group = 0; group < range.count; ++group, cursor.advance()) {
    sum_group<Codec>(sources, size, scale, group, sum);
    if (residual != nullptr) {
      numeric::add_tile<Type>(static_cast<const Storage*>(residual) + cursor.offset(), sum, cursor.width());
    }
    store_group<Codec, Type>(sum, cursor.width(), static_cast<Storage*>(out) + cursor.offset());
  }
}

template <typename Codec>
void reduce_encode(const ConstEncoded* sources, int size, float scale, size_t count, Encoded target) {
  alignas(64) float sum[Codec::kGroup];
  for (size_t group = 0; group < count; ++group) {
    sum_group<Codec>(sources, size, scale, group, sum);
    encode_group<Codec>(sum, target.codes + group * Layout<Codec>::kCodeBytes,
                        target.scales + group * Layout<Codec>::kScaleBytes);
  }
}

template <typename Codec>
constexpr CodecKernels table() {
  return {{encode<Codec, Float32>, encode<Codec, Bfloat16>, encode<Codec, Float16>},
          {reduce<Codec, Float32>, reduce<Codec, Bfloat16>, reduce<Codec, Float16>},
          reduce_encode<Codec>,
          Codec::kGroup,
          Layout<Codec>::kCodeBytes,
          Layout<Codec>::kScaleBytes};
}

}  // namespace

const Kernels kKernels = {PT_STRING(PT_KERNELS_ISA), {table<Int8>(), table<Fp8>(), table<Int4>(), table<Mxfp4>()}};

}  // namespace pt::codecs::PT_KERNELS_ISA
