// SPDX-License-Identifier: Apache-2.0
// Encode and decode behind the C ABI: checks arguments, translates exceptions.
#include <limits>
#include <new>

#include "codecs/message.h"
#include "common/error.h"
#include "pt/codecs.h"
#include "track_fusion/call_record.h"
#include "track_fusion/kernels.h"

namespace pt::codecs {

const char* codec_name(int codec) {
  static constexpr const char* kNames[] = {"none", "int8", "fp8", "int4", "mxfp4"};
  return codec >= PT_CODEC_NONE && codec <= PT_CODEC_MXFP4 ? kNames[codec] : "unknown codec";
}

namespace {

Format format_of(const char* where, int codec) {
  PT_REQUIRE(codec >= PT_CODEC_INT8 && codec <= PT_CODEC_MXFP4,
             "%s: codec is %d, expected 1 (int8), 2 (fp8), 3 (int4), 4 (mxfp4)", where, codec);
  return Format(kernels_named(track_fusion::select_kernels().name).codecs[codec - 1]);
}

void check_matrix(const char* where, const void* values, const void* encoded, size_t rows, size_t hidden) {
  constexpr size_t kLimit = std::numeric_limits<size_t>::max() / 1024;
  PT_REQUIRE(hidden > 0 && hidden < kLimit && rows <= kLimit / hidden,
             "%s: the matrix is [%zu, %zu], expected hidden of at least 1 and fewer values", where, rows, hidden);
  PT_REQUIRE(rows == 0 || (values != nullptr && encoded != nullptr), "%s: values or encoded is null, with %zu rows",
             where, rows);
}

}  // namespace
}  // namespace pt::codecs

using pt::codecs::Format;

size_t pt_codec_encoded_bytes(int codec, size_t rows, size_t hidden) noexcept {
  size_t bytes = 0;
  pt::codecs::with_codec(codec, [&](auto chosen) {
    using Layout = pt::codecs::Layout<decltype(chosen)>;
    bytes = Layout::encoded_bytes(rows * Layout::groups_per_row(hidden));
  });
  return bytes;
}

int pt_codec_encode(int codec, const void* x, const void* base, int dtype, size_t rows, size_t hidden,
                    void* encoded) noexcept {
  return pt::guarded([&] {
    const Format format = pt::codecs::format_of("encode", codec);
    PT_REQUIRE(dtype >= PT_FLOAT32 && dtype <= PT_FLOAT16,
               "encode: dtype is %d, expected 0 (float32), 1 (bfloat16), 2 (float16)", dtype);
    pt::codecs::check_matrix("encode", x, encoded, rows, hidden);
    const size_t groups = rows * format.groups_per_row(hidden);
    format.kernels().encode[dtype](x, base, {hidden, 0, groups}, format.part(encoded, groups, 0));
    if (groups > 0) format.clear_padding(encoded, groups);
  });
}

int pt_codec_decode(int codec, const void* encoded, size_t rows, size_t hidden, float* values) noexcept {
  return pt::guarded([&] {
    const Format format = pt::codecs::format_of("decode", codec);
    pt::codecs::check_matrix("decode", values, encoded, rows, hidden);
    const size_t groups = rows * format.groups_per_row(hidden);
    const pt::codecs::ConstEncoded source = format.sent_part(encoded, groups, 0);
    format.kernels().reduce[PT_FLOAT32](&source, 1, nullptr, 1.0f, values, {hidden, 0, groups});
  });
}
