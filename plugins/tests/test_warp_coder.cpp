// SPDX-License-Identifier: Apache-2.0
// What the lanes of a warp do with a row, from the device's own source: the bytes and values of the CPU's codecs.
#include "warp_of_threads.h"

// After the words of CUDA.
#include <cmath>
#include <cstring>
#include <random>

#include "cuda_fusion/device_coder.cuh"
#include "fusion_world.h"
#include "pt/codecs.h"

using namespace pt;
using namespace pt::cuda_fusion;
using namespace pt::testing;

namespace {

// Groups of different sizes; some hold a NaN, an infinity or only zeros.
std::vector<float> values_of(size_t count) {
  std::mt19937 random(static_cast<unsigned>(count));
  std::vector<float> values(count);
  for (size_t i = 0; i < count; ++i) {
    const float unit = static_cast<float>(random() % 65536) / 32768.0f - 1.0f;
    values[i] = i / 32 % 6 == 5 ? 0.0f : std::ldexp(unit, static_cast<int>(i / 32 * 37 % 90) - 50);
    if (random() % 400 == 0) values[i] = i % 2 == 0 ? INFINITY : NAN;
  }
  return values;
}

template <typename Codec>
void a_warp_makes_and_reads_the_messages_of_the_cpu(uint64_t hidden, bool delta) {
  using Payload = Coded<WarpCoder<Codec>, numeric::Float32>;
  constexpr uint64_t kRow = 1;
  const std::vector<float> x = values_of(2 * hidden), residual(2 * hidden, 0.25f);
  Call call = {};
  call.x = x.data();
  call.residual = residual.data();
  call.delta = delta;
  call.elements = 2 * hidden;
  call.rows = 2;
  call.row_elements = hidden;
  std::vector<uint8_t> message(pt_codec_encoded_bytes(Codec::kId, 1, hidden));
  std::vector<float> expected(hidden), found(hidden);
  CHECK(pt_codec_encode(Codec::kId, x.data() + hidden, delta ? residual.data() : nullptr, PT_FLOAT32, 1, hidden,
                        message.data()) == PT_OK);
  CHECK(pt_codec_decode(Codec::kId, message.data(), 1, hidden, expected.data()) == PT_OK);

  std::vector<Vector> sent(message.size() / sizeof(Vector), filled(0));
  const uint32_t packets = Payload::packets(call, kRow);
  WarpOfThreads::run([&](uint32_t lane) {
    for (uint32_t c = lane; c - c % Payload::kLanes < packets; c += kWarp) {
      const auto packet = Payload::make(call, kRow, c);
      if (c < packets) Payload::template store<Staged>(call, sent.data(), c, packet);
    }
  });
  CHECK(std::memcmp(message.data(), sent.data(), message.size()) == 0);

  for (uint32_t c = 0; c < packets; ++c) {
    const auto packet = Payload::template load<Staged>(call, sent.data(), c);
    CHECK(!Payload::is_missing(packet));
    float values[Payload::kValues];
    Payload::values(call, packet, c, values);
    for (uint32_t i = 0; i < Payload::kValues; ++i) {
      const size_t column = size_t{c} * Payload::kValues + i;
      if (column < hidden) found[column] = values[i];
    }
  }
  for (size_t i = 0; i < hidden; ++i) {
    CHECK(std::isnan(expected[i]) ? std::isnan(found[i]) : std::memcmp(&expected[i], &found[i], sizeof(float)) == 0);
  }
}

// Every word that a packet is made of is looked at: with any one of them still to come, the packet is missing.
template <typename Codec>
void no_word_of_a_packet_goes_unseen() {
  using Payload = Coded<WarpCoder<Codec>, numeric::Float32>;
  constexpr uint64_t kHidden = 512;
  const std::vector<float> x(kHidden, 1.5f);
  Call call = {};
  call.elements = call.row_elements = kHidden;
  call.rows = 1;
  std::vector<Vector> sent(pt_codec_encoded_bytes(Codec::kId, 1, kHidden) / sizeof(Vector));
  CHECK(pt_codec_encode(Codec::kId, x.data(), nullptr, PT_FLOAT32, 1, kHidden, sent.data()) == PT_OK);
  for (size_t w = 0; w < sent.size() * 4; ++w) {
    std::vector<Vector> partly = sent;
    partly[w / 4].word[w % 4] = kSentinel;
    for (uint32_t c = 0; c < Payload::packets(call, 0); ++c) {
      const auto packet = Payload::template load<Staged>(call, partly.data(), c);
      float before[Payload::kValues], after[Payload::kValues];
      Payload::values(call, Payload::template load<Staged>(call, sent.data(), c), c, before);
      Payload::values(call, packet, c, after);
      CHECK(Payload::is_missing(packet) || std::memcmp(before, after, sizeof(before)) == 0);
    }
  }
}

// A rank's slices of a row, where warps meet rows that end inside a slice, and ranks without one.
template <typename Codec>
void ranks_of_one_warp_fuse_in_two_shots(uint64_t hidden) {
  constexpr int kSize = 3;
  constexpr uint64_t kTokens = 4;
  FusionWorld world(kSize, 1, kWarp, {kSize, 4096, 4096});
  std::vector<WarpOfThreads> warps(kSize);
  std::vector<float> x[kSize], expected(kTokens * hidden), one(kTokens * hidden);
  std::vector<uint8_t> message(pt_codec_encoded_bytes(Codec::kId, kTokens, hidden));
  const auto pass = [&](const float* from, float* to) {
    CHECK(pt_codec_encode(Codec::kId, from, nullptr, PT_FLOAT32, kTokens, hidden, message.data()) == PT_OK);
    CHECK(pt_codec_decode(Codec::kId, message.data(), kTokens, hidden, to) == PT_OK);
  };
  for (int rank = 0; rank < kSize; ++rank) {
    x[rank] = values_of(kTokens * hidden + static_cast<size_t>(rank));
    pass(x[rank].data(), one.data());
    for (size_t i = 0; i < one.size(); ++i) expected[i] = rank == 0 ? one[i] : expected[i] + one[i];
  }
  for (float& value : expected) value *= 1.0f / kSize;
  pass(expected.data(), expected.data());

  std::vector<float> h[kSize];
  Plan plans[kSize];
  for (int rank = 0; rank < kSize; ++rank) {
    h[rank].assign(kTokens * hidden, 7.0f);
    pt_cuda_fusion_arguments a = {};
    a.struct_bytes = sizeof(a);
    a.dtype = PT_FLOAT32;
    a.reduction = PT_MEAN;
    a.algorithm = PT_FUSION_TWO_SHOT;
    a.tokens = kTokens;
    a.hidden = hidden;
    a.x = x[rank].data();
    a.h = h[rank].data();
    a.codec = Codec::kId;
    plans[rank] = make_plan(a, world.layout(), Limits::defaults(kSize), false);
  }
  world.run([&](int rank, HostTeam& team, const auto&) {
    warps[static_cast<size_t>(rank)].enter(team.thread());
    using Payload = Coded<WarpCoder<Codec>, numeric::Float32>;
    TwoShot<HostMemory, Payload, 0>::run(world.channel(rank), plans[rank].call, team);
  });
  for (int rank = 0; rank < kSize; ++rank) {
    CHECK(world.record(rank).ready == 0);
    for (size_t i = 0; i < expected.size(); ++i) {
      const float want = expected[i], found = h[rank][i];
      CHECK(std::isnan(want) ? std::isnan(found) : std::memcmp(&want, &found, sizeof(float)) == 0);
    }
  }
}

template <typename Codec>
void all_of() {
  for (const uint64_t hidden : {1u, 33u, 256u, 300u, 1000u}) {
    for (const bool delta : {false, true}) a_warp_makes_and_reads_the_messages_of_the_cpu<Codec>(hidden, delta);
  }
  no_word_of_a_packet_goes_unseen<Codec>();
  for (const uint64_t hidden : {33u, 1000u}) ranks_of_one_warp_fuse_in_two_shots<Codec>(hidden);
}

}  // namespace

int main() {
  all_of<codecs::Int8>();
  all_of<codecs::Fp8>();
  all_of<codecs::Int4>();
  all_of<codecs::Mxfp4>();
}
