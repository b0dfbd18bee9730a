// SPDX-License-Identifier: Apache-2.0
#include "cuda_fusion/plan.h"

#include <algorithm>
#include <cmath>

#include "codecs/layout.h"
#include "cuda_fusion/error.h"

namespace pt::cuda_fusion {
namespace {

constexpr uint32_t kWarp = 32;
constexpr uint64_t kMaxElements = uint64_t{1} << 40;

uint64_t round_up(uint64_t value, uint64_t to) { return (value + to - 1) / to * to; }

void check(const pt_cuda_fusion_arguments& a) {
  PT_FUSION_REQUIRE(a.struct_bytes == sizeof(a), "fuse: struct_bytes is %u, expected %zu: header and library differ",
                    a.struct_bytes, sizeof(a));
  PT_FUSION_REQUIRE(a.dtype >= PT_FLOAT32 && a.dtype <= PT_FLOAT16,
                    "fuse: dtype is %d, expected 0 (float32), 1 (bfloat16), 2 (float16)", a.dtype);
  PT_FUSION_REQUIRE(a.reduction == PT_MEAN || a.reduction == PT_SUM,
                    "fuse: reduction is %d, expected 0 (mean) or 1 (sum)", a.reduction);
  PT_FUSION_REQUIRE(a.hidden > 0, "fuse: hidden is 0, expected at least 1");
  PT_FUSION_REQUIRE(a.tokens <= kMaxElements / a.hidden, "fuse: %llu tokens of %llu are too many",
                    static_cast<unsigned long long>(a.tokens), static_cast<unsigned long long>(a.hidden));
  PT_FUSION_REQUIRE(a.tokens == 0 || (a.x != nullptr && a.h != nullptr), "fuse: %s is null",
                    a.x == nullptr ? "x" : "h");
  PT_FUSION_REQUIRE((a.num_gammas == 0) == (a.gamma == nullptr), "fuse: num_gammas is %u and gamma is %s", a.num_gammas,
                    a.gamma == nullptr ? "null" : "given");
  PT_FUSION_REQUIRE(a.num_gammas == 0 || a.tokens == 0 || a.norm_out != nullptr, "fuse: norm_out is null");
  PT_FUSION_REQUIRE(a.num_gammas == 0 || a.gamma_dtype == a.dtype || a.gamma_dtype == PT_FLOAT32,
                    "fuse: gamma has dtype %d, expected %d or 0 (float32)", a.gamma_dtype, a.dtype);
  PT_FUSION_REQUIRE(a.codec >= PT_CODEC_NONE && a.codec <= PT_CODEC_MXFP4,
                    "fuse: codec is %d, expected 0 (none), 1 (int8), 2 (fp8), 3 (int4) or 4 (mxfp4)", a.codec);
  PT_FUSION_REQUIRE(
      a.delta == 0 || (a.codec != PT_CODEC_NONE && a.reduction == PT_MEAN && (a.tokens == 0 || a.residual != nullptr)),
      "fuse: delta needs a codec, a mean and a residual");
  PT_FUSION_REQUIRE(std::isfinite(a.eps) && a.eps >= 0, "fuse: eps is %g, expected a number from 0",
                    static_cast<double>(a.eps));
}

bool on_sixteen(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % sizeof(Vector) == 0; }

// Vectors of one row in transit.
uint32_t vectors_in_transit(int codec, uint64_t row_elements, uint32_t vectors) {
  codecs::with_codec(codec, [&](auto chosen) {
    using Layout = codecs::Layout<decltype(chosen)>;
    vectors = static_cast<uint32_t>(Layout::encoded_bytes(Layout::groups_per_row(row_elements)) / sizeof(Vector));
  });
  return vectors;
}

// What a rank owns of a row in two-shot.
void cut_into_slices(Call& call, int codec, uint32_t per_vector, uint32_t size) {
  const uint32_t unit = codec == PT_CODEC_NONE ? per_vector : kEncodedAtOnce;
  const uint64_t units = (call.row_elements + unit - 1) / unit;
  call.slice_elements = static_cast<uint32_t>((units + size - 1) / size) * unit;
  call.slice_vectors = vectors_in_transit(codec, call.slice_elements, call.slice_elements / per_vector);
}

// Rows that pass through the staging memory at once.
uint64_t rows_at_once(Algorithm algorithm, const Call& call, const Layout& layout) {
  const uint64_t padded =
      algorithm == Algorithm::kTwoShot ? uint64_t{call.slice_vectors} * layout.size : call.row_vectors;
  const uint64_t rows = layout.staging_bytes / (padded * sizeof(Vector));
  PT_FUSION_REQUIRE(rows > 0, "fuse: a row takes %llu bytes of staging memory, staging_bytes is %llu",
                    static_cast<unsigned long long>(padded * sizeof(Vector)),
                    static_cast<unsigned long long>(layout.staging_bytes));
  return std::min(rows, call.rows);
}

void cut_into_pieces(Algorithm algorithm, Call& call, const Layout& layout) {
  call.piece_rows = rows_at_once(algorithm, call, layout);
  call.num_pieces = static_cast<uint32_t>((call.rows + call.piece_rows - 1) / call.piece_rows);
}

}  // namespace

size_t dtype_bytes(int dtype) noexcept { return dtype == PT_FLOAT32 ? 4 : 2; }

Plan make_plan(const pt_cuda_fusion_arguments& a, const Layout& layout, const Limits& limits, bool has_nccl,
               bool has_nvls) {
  check(a);
  const uint32_t per_vector = static_cast<uint32_t>(sizeof(Vector) / dtype_bytes(a.dtype));
  Plan plan = {};
  Call& call = plan.call;
  call = {.x = a.x,
          .residual = a.residual,
          .h = a.h,
          .gamma = a.gamma,
          .norm_out = a.norm_out,
          .elements = a.tokens * a.hidden,
          .rows = a.tokens,
          .row_elements = a.hidden,
          .row_vectors = 0,
          .slice_elements = 0,
          .slice_vectors = 0,
          .num_gammas = a.num_gammas,
          .piece_rows = 0,
          .num_pieces = 1,
          .scale = a.reduction == PT_MEAN ? 1.0f / static_cast<float>(layout.size) : 1.0f,
          .eps = a.eps,
          .gamma_is_float = a.gamma_dtype == PT_FLOAT32,
          .delta = a.delta != 0,
          .aligned = false};
  plan.codec = a.codec;
  if (a.num_gammas == 0 && a.codec == PT_CODEC_NONE) {  // groups of a codec end with a token
    call.row_elements = uint64_t{kFlatVectors} * per_vector;
    call.rows = (call.elements + call.row_elements - 1) / call.row_elements;
    // A short message is one row of its own length, or all its threads but a few would idle in the slices of others.
    if (call.rows == 1) call.row_elements = call.elements;
  }
  PT_FUSION_REQUIRE(call.row_elements < uint64_t{1} << 24, "fuse: hidden is %llu, expected less than 2^24",
                    static_cast<unsigned long long>(call.row_elements));
  const auto vectors = static_cast<uint32_t>((call.row_elements + per_vector - 1) / per_vector);
  call.row_vectors = vectors_in_transit(a.codec, call.row_elements, vectors);
  cut_into_slices(call, a.codec, per_vector, layout.size);
  call.aligned = call.elements % per_vector == 0 && call.row_elements % per_vector == 0 && on_sixteen(a.x) &&
                 on_sixteen(a.residual) && on_sixteen(a.h) && on_sixteen(a.norm_out);
  plan.threads = static_cast<uint32_t>(std::min<uint64_t>(round_up(vectors, kWarp), kMaxBlockThreads));
  if (call.rows == 0) return plan;

  const Selection selection = {.size = static_cast<int>(layout.size),
                               .bytes = call.rows * call.row_vectors * sizeof(Vector),
                               .one_shot_room = layout.one_shot_bytes,
                               .is_coded = a.codec != PT_CODEC_NONE,
                               .encodes_once = a.algorithm == PT_FUSION_ENCODE_ONCE,
                               .has_residual = a.residual != nullptr,
                               .has_nccl = has_nccl};
  const bool is_chosen_here = a.algorithm == PT_FUSION_AUTO || a.algorithm == PT_FUSION_ENCODE_ONCE;
  plan.algorithm = is_chosen_here ? select_algorithm(selection, limits) : static_cast<Algorithm>(a.algorithm);
  switch (plan.algorithm) {
    case Algorithm::kOneShot:
      PT_FUSION_REQUIRE(selection.bytes <= layout.one_shot_bytes,
                        "fuse: the message has %zu bytes, one-shot has room for %llu", selection.bytes,
                        static_cast<unsigned long long>(layout.one_shot_bytes));
      break;
    case Algorithm::kNvls:
      PT_FUSION_REQUIRE(layout.size > 1, "fuse: nvls needs at least 2 ranks, this channel has 1");
      PT_FUSION_REQUIRE(a.codec == PT_CODEC_NONE,
                        "fuse: nvls has no coded form (the switch adds elements), "
                        "use one_shot or pull");
      PT_FUSION_REQUIRE(has_nvls, "fuse: nvls was asked for, and the channel was opened without use_nvls");
      cut_into_pieces(plan.algorithm, call, layout);
      break;
    case Algorithm::kTwoShot:
      PT_FUSION_REQUIRE(a.codec != PT_CODEC_NONE || a.residual == nullptr,
                        "fuse: two-shot cannot add a residual before the one rounding, use pull");
      [[fallthrough]];
    case Algorithm::kPull:
      cut_into_pieces(plan.algorithm, call, layout);
      break;
    case Algorithm::kNccl:
      PT_FUSION_REQUIRE(a.codec == PT_CODEC_NONE, "fuse: nccl has no coded form, use two_shot");
      PT_FUSION_REQUIRE(a.residual == nullptr, "fuse: nccl cannot add a residual before the one rounding, use pull");
      PT_FUSION_REQUIRE(has_nccl, "fuse: nccl was asked for, and not every rank has libnccl.so.2");
      break;
    default:
      PT_FUSION_REQUIRE(false, "fuse: algorithm is %d, expected %d to %d", a.algorithm, PT_FUSION_ENCODE_ONCE,
                        kNumAlgorithms - 1);
  }
  return plan;
}

}  // namespace pt::cuda_fusion
