// SPDX-License-Identifier: Apache-2.0
// The C ABI of the kernels around attention: checks, and the loops over tracks, tokens and heads.
#include "attention/checks.h"
#include "attention/kernels.h"

using namespace pt::attention;

namespace {

char* at(void* data, int64_t elements, int dtype) {
  return static_cast<char*>(data) + elements * (dtype == PT_FLOAT32 ? 4 : 2);
}

const char* at(const void* data, int64_t elements, int dtype) { return at(const_cast<void*>(data), elements, dtype); }

template <typename Body>
void for_each_token(const pt_rows& rows, int num_tracks, int num_tokens, Body&& body) {
  for (int track = 0; track < num_tracks; ++track) {
    for (int token = 0; token < num_tokens; ++token) {
      body(track, token, at(rows.data, track * rows.track_stride + token * rows.token_stride, rows.dtype));
    }
  }
}

void check_weight_dtype(const char* where, int weight_dtype, int dtype) {
  PT_ATTENTION_REQUIRE(weight_dtype == dtype || weight_dtype == PT_FLOAT32,
                       "%s: the weight has dtype %d, expected %d or 0 (float32)", where, weight_dtype, dtype);
}

void check_prologue(const pt_rows* qkv, int num_tracks, int num_tokens, const pt_qk_prologue* work) {
  PT_ATTENTION_REQUIRE(work != nullptr, "qk_norm_rope: the description is null");
  const int64_t dim = work->head_dim;
  PT_ATTENTION_REQUIRE(dim > 0 && dim % 2 == 0 && dim <= PT_ATTENTION_MAX_HEAD_DIM,
                       "qk_norm_rope: head_dim is %d, expected an even number up to %d", work->head_dim,
                       PT_ATTENTION_MAX_HEAD_DIM);
  PT_ATTENTION_REQUIRE(work->num_heads > 0 && work->num_kv_heads > 0, "qk_norm_rope: %d heads and %d key heads",
                       work->num_heads, work->num_kv_heads);
  check_rows("qk_norm_rope", "qkv", qkv, num_tracks, num_tokens,
             (work->num_heads + 2 * int64_t{work->num_kv_heads}) * dim);
  PT_ATTENTION_REQUIRE(work->norm >= PT_QK_NORM_NONE && work->norm <= PT_QK_NORM_AFTER_ROPE,
                       "qk_norm_rope: norm is %d, expected 0 (none), 1 (before rope) or 2 (after rope)", work->norm);
  PT_ATTENTION_REQUIRE(work->rope >= PT_ROPE_NONE && work->rope <= PT_ROPE_HALF,
                       "qk_norm_rope: rope is %d, expected 0 (none), 1 (interleaved) or 2 (half)", work->rope);
  if (work->norm != PT_QK_NORM_NONE) check_weight_dtype("qk_norm_rope", work->weight_dtype, qkv->dtype);
  if (work->rope == PT_ROPE_NONE) return;
  PT_ATTENTION_REQUIRE(work->cos != nullptr && work->sin != nullptr, "qk_norm_rope: cos or sin is null");
  PT_ATTENTION_REQUIRE(work->positions != nullptr || num_tokens <= work->num_rows,
                       "qk_norm_rope: %d tokens, but the tables have %lld rows", num_tokens,
                       static_cast<long long>(work->num_rows));
  for (int token = 0; work->positions != nullptr && token < num_tokens; ++token) {
    PT_ATTENTION_REQUIRE(work->positions[token] >= 0 && work->positions[token] < work->num_rows,
                         "qk_norm_rope: token %d is at position %lld, but the tables have %lld rows", token,
                         static_cast<long long>(work->positions[token]), static_cast<long long>(work->num_rows));
  }
}

}  // namespace

extern "C" {

int pt_rms_norm(const pt_rows* x, const pt_rows* out, int num_tracks, int num_tokens, int width, const void* weight,
                int weight_dtype, int64_t weight_track_stride, float eps, int pre_scale) noexcept {
  return pt::guarded([&] {
    check_rows("rms_norm", "x", x, num_tracks, num_tokens, width);
    check_rows("rms_norm", "out", out, num_tracks, num_tokens, width);
    PT_ATTENTION_REQUIRE(x->dtype == out->dtype, "rms_norm: x has dtype %d and out %d, expected one", x->dtype,
                         out->dtype);
    if (weight != nullptr) check_weight_dtype("rms_norm", weight_dtype, x->dtype);
    const auto kernel = select_kernels().rms_norm[x->dtype][weight_dtype == PT_FLOAT32];
    for_each_token(*x, num_tracks, num_tokens, [&](int track, int token, const char* row) {
      const void* gamma = weight == nullptr ? nullptr : at(weight, track * weight_track_stride, weight_dtype);
      void* target = at(out->data, track * out->track_stride + token * out->token_stride, out->dtype);
      kernel(row, gamma, target, static_cast<size_t>(width), eps, pre_scale != 0);
    });
  });
}

int pt_qk_norm_rope(const pt_rows* qkv, int num_tracks, int num_tokens, const pt_qk_prologue* work) noexcept {
  return pt::guarded([&] {
    check_prologue(qkv, num_tracks, num_tokens, work);
    const Kernels& kernels = select_kernels();
    const auto norm = kernels.rms_norm[qkv->dtype][work->weight_dtype == PT_FLOAT32];
    const auto rope = kernels.rope[qkv->dtype];
    const size_t dim = static_cast<size_t>(work->head_dim);
    for_each_token(*qkv, num_tracks, num_tokens, [&](int track, int token, char* row) {
      const int64_t at_row = work->positions == nullptr ? token : work->positions[token];
      const int64_t angles = at_row * static_cast<int64_t>(dim / 2);
      for (int head = 0; head < work->num_heads + work->num_kv_heads; ++head) {
        const bool is_query = head < work->num_heads;
        const void* weight = is_query ? work->query_weight : work->key_weight;
        const int64_t stride = is_query ? work->query_weight_track_stride : work->key_weight_track_stride;
        if (weight != nullptr) weight = at(weight, track * stride, work->weight_dtype);
        void* data = at(row, head * static_cast<int64_t>(dim), qkv->dtype);
        if (work->norm == PT_QK_NORM_BEFORE_ROPE) norm(data, weight, data, dim, work->eps, false);
        if (work->rope != PT_ROPE_NONE) {
          rope(data, work->cos + angles, work->sin + angles, dim, work->rope == PT_ROPE_INTERLEAVED);
        }
        if (work->norm == PT_QK_NORM_AFTER_ROPE) norm(data, weight, data, dim, work->eps, false);
      }
    });
  });
}

int pt_add(const pt_rows* x, const pt_rows* y, const pt_rows* out, int num_tracks, int num_tokens, int width) noexcept {
  return pt::guarded([&] {
    check_rows("add", "x", x, num_tracks, num_tokens, width);
    check_rows("add", "y", y, num_tracks, num_tokens, width);
    check_rows("add", "out", out, num_tracks, num_tokens, width);
    PT_ATTENTION_REQUIRE(x->dtype == y->dtype && x->dtype == out->dtype,
                         "add: x has dtype %d, y %d and out %d, expected one", x->dtype, y->dtype, out->dtype);
    const auto kernel = select_kernels().add[x->dtype];
    for_each_token(*x, num_tracks, num_tokens, [&](int track, int token, const char* row) {
      const void* other = at(y->data, track * y->track_stride + token * y->token_stride, y->dtype);
      void* target = at(out->data, track * out->track_stride + token * out->token_stride, out->dtype);
      kernel(row, other, target, static_cast<size_t>(width));
    });
  });
}

int pt_swiglu(const pt_rows* x, const pt_rows* out, int num_tracks, int num_tokens, int width,
              int gate_first) noexcept {
  return pt::guarded([&] {
    check_rows("swiglu", "x", x, num_tracks, num_tokens, 2 * int64_t{width});
    check_rows("swiglu", "out", out, num_tracks, num_tokens, width);
    PT_ATTENTION_REQUIRE(x->dtype == out->dtype, "swiglu: x has dtype %d and out %d, expected one", x->dtype,
                         out->dtype);
    const auto kernel = select_kernels().swiglu[x->dtype];
    for_each_token(*x, num_tracks, num_tokens, [&](int track, int token, const char* row) {
      const char* second = at(row, width, x->dtype);
      void* target = at(out->data, track * out->track_stride + token * out->token_stride, out->dtype);
      kernel(gate_first ? row : second, gate_first ? second : row, target, static_cast<size_t>(width));
    });
  });
}

}  // extern "C"
