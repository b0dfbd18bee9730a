// SPDX-License-Identifier: Apache-2.0
// Walks a program. The arithmetic lives in the libraries of the matrix and attention kernels.
#include "pt/program.h"

#include <chrono>
#include <cstring>
#include <vector>

#include "common/error.h"

namespace {

#define PT_PROGRAM_REQUIRE(condition, ...)                                                                  \
  do {                                                                                                      \
    if (!(condition)) throw ::pt::Error(PT_INVALID_ARGUMENT, "program: " + ::pt::format_text(__VA_ARGS__)); \
  } while (false)

void check(int status, const char* (*last_error)()) {
  if (status != 0) throw pt::Error(PT_INVALID_ARGUMENT, last_error());
}

// What every operation of a step shares.
struct Step {
  const pt_program_step& given;
  int num_tokens;
  const std::vector<int64_t>& positions;
};

void run(const pt_program_embed& op, const Step& step) {
  for (int token = 0; token < step.num_tokens; ++token) {
    const int64_t id = step.given.token_ids[token];
    PT_PROGRAM_REQUIRE(id >= 0 && id < op.num_rows, "embed: token %d has id %lld, expected 0 to %lld", token,
                       static_cast<long long>(id), static_cast<long long>(op.num_rows - 1));
    std::memcpy(static_cast<char*>(op.out) + static_cast<size_t>(token) * op.row_bytes,
                static_cast<const char*>(op.table) + static_cast<size_t>(id) * op.row_bytes, op.row_bytes);
  }
}

void run(const pt_program_linear& op, const Step& step) {
  const auto rows = static_cast<size_t>(step.num_tokens);
  const int threads = step.given.num_threads;
  check(op.up == nullptr ? pt_linear_forward(op.weight, op.x, op.bias, op.y, rows, op.dtype, threads)
                         : pt_linear_swiglu(op.weight, op.up, op.x, op.y, rows, op.dtype, threads),
        pt_linear_last_error);
}

void run(const pt_program_rms_norm& op, const Step& step) {
  check(pt_rms_norm(&op.x, &op.out, op.num_tracks, step.num_tokens, op.width, op.weight, op.weight_dtype,
                    op.weight_track_stride, op.eps, op.pre_scale),
        pt_attention_last_error);
}

void run(const pt_program_add& op, const Step& step) {
  check(pt_add(&op.x, &op.y, &op.out, op.num_tracks, step.num_tokens, op.width), pt_attention_last_error);
}

void run(const pt_program_qk_norm_rope& op, const Step& step) {
  pt_qk_prologue work = op.work;
  work.positions = step.positions.data();
  check(pt_qk_norm_rope(&op.qkv, op.num_tracks, step.num_tokens, &work), pt_attention_last_error);
}

void run(const pt_program_attend& op, const Step& step) {
  const int threads = step.given.num_threads;
  PT_PROGRAM_REQUIRE(op.batch >= 0 && op.batch < step.given.num_batches, "attend: batch is %d, expected 0 to %d",
                     op.batch, step.given.num_batches - 1);
  const pt_ragged_batch* batch = step.given.batches[op.batch];
  check(pt_attention_write(op.cache, batch, &op.key, &op.value, threads), pt_attention_last_error);
  check(pt_attention_attend(op.cache, batch, &op.query, op.num_heads, op.window, op.scale, &op.out, threads),
        pt_attention_last_error);
}

void dispatch(const pt_program_op& op, const Step& step) {
  PT_PROGRAM_REQUIRE(op.work != nullptr, "an operation of kind %d is null", op.kind);
  switch (static_cast<pt_program_kind>(op.kind)) {
    case PT_PROGRAM_EMBED:
      return run(*static_cast<const pt_program_embed*>(op.work), step);
    case PT_PROGRAM_LINEAR:
      return run(*static_cast<const pt_program_linear*>(op.work), step);
    case PT_PROGRAM_RMS_NORM:
      return run(*static_cast<const pt_program_rms_norm*>(op.work), step);
    case PT_PROGRAM_ADD:
      return run(*static_cast<const pt_program_add*>(op.work), step);
    case PT_PROGRAM_QK_NORM_ROPE:
      return run(*static_cast<const pt_program_qk_norm_rope*>(op.work), step);
    case PT_PROGRAM_ATTEND:
      return run(*static_cast<const pt_program_attend*>(op.work), step);
  }
  PT_PROGRAM_REQUIRE(false, "kind is %d, expected 0 to %d", op.kind, PT_PROGRAM_KINDS - 1);
}

void find_positions(const pt_ragged_batch& batch, std::vector<int64_t>& positions) {
  positions.assign(static_cast<size_t>(batch.total_tokens), 0);
  for (int s = 0; s < batch.num_sequences; ++s) {
    const int first = batch.first_token[s], count = batch.num_tokens[s];
    PT_PROGRAM_REQUIRE(first >= 0 && count >= 0 && first <= batch.total_tokens - count,
                       "sequence %d has tokens %d to %d of %d", s, first, first + count - 1, batch.total_tokens);
    for (int token = 0; token < count; ++token) {
      positions[static_cast<size_t>(first + token)] = int64_t{batch.past[s]} + token;
    }
  }
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

extern "C" {

const char* pt_program_last_error(void) noexcept { return pt::last_error(); }

int pt_program_abi_version(void) noexcept { return PT_PROGRAM_ABI_VERSION; }

int pt_program_run(const pt_program_op* ops, size_t num_ops, const pt_program_step* step, double* seconds) noexcept {
  return pt::guarded([&] {
    PT_PROGRAM_REQUIRE(ops != nullptr && step != nullptr && seconds != nullptr, "ops, step or seconds is null");
    PT_PROGRAM_REQUIRE(step->batches != nullptr && step->token_ids != nullptr, "a step's batches or tokens are null");
    PT_PROGRAM_REQUIRE(step->num_batches > 0, "a step of %d batches, expected at least one", step->num_batches);
    for (int i = 0; i < step->num_batches; ++i) {
      PT_PROGRAM_REQUIRE(step->batches[i] != nullptr, "batch %d is null", i);
      PT_PROGRAM_REQUIRE(step->batches[i]->total_tokens == step->batches[0]->total_tokens,
                         "batch %d has %d tokens, the first %d", i, step->batches[i]->total_tokens,
                         step->batches[0]->total_tokens);
    }
    const pt_ragged_batch& batch = *step->batches[0];
    PT_PROGRAM_REQUIRE(batch.total_tokens >= 0 && batch.num_sequences >= 0, "a step of %d tokens", batch.total_tokens);
    static thread_local std::vector<int64_t> positions;  // kept: a step runs several lists
    find_positions(batch, positions);
    const Step shared{*step, batch.total_tokens, positions};
    double before = now();
    for (size_t i = 0; i < num_ops; ++i) {
      dispatch(ops[i], shared);
      const double after = now();
      seconds[ops[i].kind] += after - before;
      before = after;
    }
  });
}

}  // extern "C"
