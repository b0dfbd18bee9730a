// SPDX-License-Identifier: Apache-2.0
// Fusion with encoded payloads, threads as ranks. Run it under ThreadSanitizer with -DPT_SANITIZE=thread.
#include <cmath>
#include <cstring>
#include <random>

#include "check.h"
#include "pt/codecs.h"

using namespace pt;
using namespace pt::track_fusion;

namespace {

struct Shape {
  size_t tokens, hidden;
};

std::vector<float> values_of(int rank, const Shape& shape, uint32_t seed) {
  std::mt19937 random(seed + 977u * static_cast<uint32_t>(rank));
  std::normal_distribution<float> normal;
  std::vector<float> values(shape.tokens * shape.hidden);
  for (float& value : values) value = normal(random);
  return values;
}

// decode(encode(x - base)), by the functions of the C ABI.
std::vector<float> passed_through(int codec, const std::vector<float>& x, const float* base, const Shape& shape) {
  std::vector<uint8_t> message(pt_codec_encoded_bytes(codec, shape.tokens, shape.hidden));
  std::vector<float> values(x.size());
  CHECK(pt_codec_encode(codec, x.data(), base, PT_FLOAT32, shape.tokens, shape.hidden, message.data()) == PT_OK);
  CHECK(pt_codec_decode(codec, message.data(), shape.tokens, shape.hidden, values.data()) == PT_OK);
  return values;
}

// The rules of pt/codecs.h in plain steps.
std::vector<float> expected(int codec, bool delta, bool two_shot, int size, const Shape& shape, uint32_t seed,
                            const std::vector<float>& residual) {
  const float* base = delta ? residual.data() : nullptr;
  std::vector<float> sum = passed_through(codec, values_of(0, shape, seed), base, shape);
  for (int rank = 1; rank < size; ++rank) {
    const std::vector<float> other = passed_through(codec, values_of(rank, shape, seed), base, shape);
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += other[i];
  }
  for (float& value : sum) value *= 1.0f / static_cast<float>(size);
  if (two_shot) sum = passed_through(codec, sum, nullptr, shape);
  for (size_t i = 0; i < sum.size(); ++i) sum[i] += residual[i];
  return sum;
}

// 4096 bytes of capacity cut every message but the smallest into pieces, at groups and not at rows.
void every_rank_gets_the_bits_of_the_rules(int size, size_t capacity) {
  const Shape shapes[] = {{0, 64}, {1, 1}, {1, 64}, {3, 200}, {37, 512}};
  testing::run_ranks(size, capacity, 60.0, [&](Group& group, int rank) {
    uint32_t seed = 1;
    for (const Shape& shape : shapes) {
      for (int codec = PT_CODEC_INT8; codec <= PT_CODEC_MXFP4; ++codec) {
        for (const int algorithm : {PT_ONE_SHOT, PT_TWO_SHOT}) {
          for (const bool delta : {false, true}) {
            ++seed;
            const std::vector<float> x = values_of(rank, shape, seed), residual = values_of(99, shape, seed);
            std::vector<float> h = x;  // in place
            const FuseArgs args = {
                h.data(), residual.data(), h.data(), shape.tokens, shape.hidden, PT_FLOAT32, PT_MEAN, nullptr,
                0,        PT_FLOAT32,      0,        nullptr};
            group.fuse_coded(args, {codec, delta, algorithm}, -1);
            const bool two_shot = algorithm == PT_TWO_SHOT;
            const auto wanted = expected(codec, delta, two_shot, size, shape, seed, residual);
            CHECK(wanted.size() == h.size());
            if (!h.empty()) CHECK(std::memcmp(wanted.data(), h.data(), h.size() * sizeof(float)) == 0);
          }
        }
      }
    }
  });
}

// What auto chooses: small messages one-shot, large ones two-shot from three ranks on.
void auto_depends_on_size_and_ranks() {
  for (const int size : {2, 3}) {
    testing::run_ranks(size, 65536, 60.0, [&](Group& group, int rank) {
      for (const Shape& shape : {Shape{4, 128}, Shape{200, 128}}) {
        const std::vector<float> x = values_of(rank, shape, 3), residual(x.size(), 0.25f);
        std::vector<float> h(x.size());
        const FuseArgs args = {
            x.data(), residual.data(), h.data(), shape.tokens, shape.hidden, PT_FLOAT32, PT_MEAN, nullptr,
            0,        PT_FLOAT32,      0,        nullptr};
        group.fuse_coded(args, {PT_CODEC_INT4, false, PT_AUTO}, -1);
        const bool two_shot = size == 3 && shape.tokens == 200;
        CHECK(h == expected(PT_CODEC_INT4, false, two_shot, size, shape, 3, residual));
      }
    });
  }
}

// One token's bits do not depend on the others of its batch, nor on the pieces a message is cut into.
void a_token_does_not_depend_on_its_batch() {
  const Shape batch = {64, 200}, alone = {1, 200};
  testing::run_ranks(3, 4096, 60.0, [&](Group& group, int rank) {
    const std::vector<float> x = values_of(rank, batch, 5);
    std::vector<float> together(x.size()), single(alone.hidden);
    const auto fuse = [&](const float* from, float* to, const Shape& shape, int codec) {
      const FuseArgs args = {from, nullptr,    to, shape.tokens, shape.hidden, PT_FLOAT32, PT_MEAN, nullptr,
                             0,    PT_FLOAT32, 0,  nullptr};
      group.fuse_coded(args, {codec, false, PT_ONE_SHOT}, -1);
    };
    for (int codec = PT_CODEC_INT8; codec <= PT_CODEC_MXFP4; ++codec) {
      fuse(x.data(), together.data(), batch, codec);
      for (const size_t token : {0u, 17u, 63u}) {
        fuse(x.data() + token * batch.hidden, single.data(), alone, codec);
        CHECK(std::memcmp(single.data(), together.data() + token * batch.hidden, single.size() * 4) == 0);
      }
    }
  });
}

void a_nan_reaches_every_rank() {
  testing::run_ranks(2, 4096, 60.0, [](Group& group, int rank) {
    std::vector<float> x(64, 1.0f), h(64);
    if (rank == 1) x[3] = std::numeric_limits<float>::infinity();
    const FuseArgs args = {x.data(), nullptr, h.data(), 1, 64, PT_FLOAT32, PT_MEAN, nullptr, 0, PT_FLOAT32, 0, nullptr};
    group.fuse_coded(args, {PT_CODEC_INT8, false, PT_ONE_SHOT}, -1);
    for (size_t i = 0; i < 64; ++i) CHECK(i < 32 ? std::isnan(h[i]) : std::fabs(h[i] - 1.0f) < 0.01f);
  });
}

void different_codecs_are_a_mismatch() {
  testing::run_ranks(2, 4096, 60.0, [](Group& group, int rank) {
    float x[32] = {};
    const FuseArgs args = {x, nullptr, x, 1, 32, PT_FLOAT32, PT_MEAN, nullptr, 0, PT_FLOAT32, 0, nullptr};
    const Error error = testing::caught([&] {
      group.fuse_coded(args, {rank == 0 ? PT_CODEC_INT8 : PT_CODEC_MXFP4, false, PT_ONE_SHOT}, -1);
      group.barrier(-1);
    });
    CHECK(error.status() == PT_MISMATCH || error.status() == PT_ABORTED);
    CHECK_CONTAINS(error.what(), "fuse(mean, float32 [1, 32], int8 one-shot)");
    CHECK_CONTAINS(error.what(), "fuse(mean, float32 [1, 32], mxfp4 one-shot)");
  });
}

}  // namespace

int main() {
  for (const int size : {1, 2, 3, 4}) every_rank_gets_the_bits_of_the_rules(size, size == 3 ? 65536 : 4096);
  auto_depends_on_size_and_ranks();
  a_token_does_not_depend_on_its_batch();
  a_nan_reaches_every_rank();
  different_codecs_are_a_mismatch();
}
