// SPDX-License-Identifier: Apache-2.0
// Encoded messages in the protocols of CUDA track fusion, on threads with random delays. Run it under ThreadSanitizer
// as well. What must come out is made by the C ABI of the codecs in plain steps, and compared bit by bit.
#include <cmath>

#include "cuda_fusion/host_coder.h"
#include "fusion_world.h"
#include "pt/codecs.h"

using namespace pt;
using namespace pt::testing;

namespace {

// An element without the attributes of Type::Storage, which containers ignore.
template <typename Type>
using Element = std::conditional_t<sizeof(typename Type::Storage) == 4, float, uint16_t>;

struct Case {
  Algorithm algorithm;
  uint64_t tokens;
  uint64_t hidden;
  bool has_residual;
  bool delta;
  bool has_norm;
  size_t count() const { return tokens * hidden; }
};

// The same on all ranks: from the number of the call.
Case draw(unsigned call) {
  std::mt19937 random(call * 104729 + 7);
  const uint64_t hiddens[] = {1, 33, 128, 300,
                              700};  // rows that end inside a group, a word of scales, a vector, a slice
  Case drawn = {};
  drawn.algorithm = static_cast<Algorithm>(random() % 3);
  drawn.hidden = hiddens[random() % std::size(hiddens)];
  drawn.tokens = 1 + random() % (drawn.algorithm == Algorithm::kOneShot ? 4 : 12);
  drawn.has_residual = random() % 2 == 0;
  drawn.delta = drawn.has_residual && random() % 2 == 0;
  drawn.has_norm = random() % 2 == 0;
  return drawn;
}

// Groups of different sizes, some with a NaN or only zeros.
template <typename Type>
std::vector<Element<Type>> values_of(int rank, unsigned call, size_t count) {
  std::mt19937 random(call * 977 + static_cast<unsigned>(rank));
  std::vector<Element<Type>> values(count);
  for (size_t i = 0; i < count; ++i) {
    const float unit = static_cast<float>(random() % 65536) / 32768.0f - 1.0f;
    float value = std::ldexp(unit, static_cast<int>(i / 32 % 9) - 4);
    if (i / 32 % 5 == 4) value = 0.0f;
    if (random() % 512 == 0) value = std::numeric_limits<float>::quiet_NaN();
    values[i] = Type::from_float(value);
  }
  return values;
}

template <typename Type>
std::vector<Element<Type>> expected(int codec, int dtype, const Case& drawn, int size, unsigned call) {
  const auto residual = values_of<Type>(99, call, drawn.count());
  std::vector<uint8_t> message(pt_codec_encoded_bytes(codec, drawn.tokens, drawn.hidden));
  std::vector<float> sums(drawn.count()), one(drawn.count());
  for (int rank = 0; rank < size; ++rank) {
    const auto x = values_of<Type>(rank, call, drawn.count());
    CHECK(pt_codec_encode(codec, x.data(), drawn.delta ? residual.data() : nullptr, dtype, drawn.tokens, drawn.hidden,
                          message.data()) == PT_OK);
    CHECK(pt_codec_decode(codec, message.data(), drawn.tokens, drawn.hidden, one.data()) == PT_OK);
    for (size_t i = 0; i < one.size(); ++i) sums[i] = rank == 0 ? one[i] : sums[i] + one[i];
  }
  for (float& sum : sums) sum *= 1.0f / static_cast<float>(size);
  if (drawn.algorithm == Algorithm::kTwoShot) {
    CHECK(pt_codec_encode(codec, sums.data(), nullptr, PT_FLOAT32, drawn.tokens, drawn.hidden, message.data()) ==
          PT_OK);
    CHECK(pt_codec_decode(codec, message.data(), drawn.tokens, drawn.hidden, sums.data()) == PT_OK);
  }
  std::vector<Element<Type>> h(drawn.count());
  for (size_t i = 0; i < h.size(); ++i) {
    h[i] = Type::from_float(drawn.has_residual ? sums[i] + Type::to_float(residual[i]) : sums[i]);
  }
  return h;
}

template <typename Type>
struct Tensors {
  std::vector<Element<Type>> x, residual, h, norm;
  std::vector<float> gamma;

  Plan prepare(int codec, int dtype, const Case& drawn, int rank, unsigned call, const Layout& layout) {
    x = values_of<Type>(rank, call, drawn.count());
    residual = values_of<Type>(99, call, drawn.count());
    h.assign(drawn.count(), Type::from_float(77.0f));
    norm = h;
    gamma.assign(drawn.hidden, 1.0f);
    pt_cuda_fusion_arguments a = {};
    a.struct_bytes = sizeof(a);
    a.dtype = dtype;
    a.reduction = PT_MEAN;
    a.algorithm = static_cast<int>(drawn.algorithm);
    a.tokens = drawn.tokens;
    a.hidden = drawn.hidden;
    a.x = x.data();
    a.residual = drawn.has_residual ? residual.data() : nullptr;
    a.h = h.data();
    a.gamma = drawn.has_norm ? gamma.data() : nullptr;
    a.norm_out = norm.data();
    a.num_gammas = drawn.has_norm ? 1 : 0;
    a.gamma_dtype = PT_FLOAT32;
    a.eps = 1e-5f;
    a.codec = codec;
    a.delta = drawn.delta;
    return make_plan(a, layout, Limits::defaults(static_cast<int>(layout.size)), false);
  }
};

template <typename Codec, typename Type, int kRanks>
void every_rank_gets_the_bits_of_the_codec(int size, uint32_t num_blocks, uint32_t threads, int dtype, unsigned calls) {
  FusionWorld world(size, num_blocks, threads, {static_cast<uint32_t>(size), 16384, 2560});
  std::vector<Tensors<Type>> tensors(static_cast<size_t>(size));
  std::vector<Case> cases(static_cast<size_t>(size));
  std::vector<Plan> plans(static_cast<size_t>(size));
  world.run([&](int rank, HostTeam& team, const auto& kernel_boundary) {
    const auto r = static_cast<size_t>(rank);
    for (unsigned call = 0; call < calls; ++call) {
      if (kernel_boundary()) {
        cases[r] = draw(call);
        plans[r] = tensors[r].prepare(Codec::kId, dtype, cases[r], rank, call, world.layout());
      }
      kernel_boundary();
      using Payload = Coded<HostCoder<Codec>, Type>;
      run_protocol<DelayedMemory, Payload, kRanks>(plans[r].algorithm, world.channel(rank), plans[r].call, team);
      if (kernel_boundary()) {
        const auto want = expected<Type>(Codec::kId, dtype, cases[r], size, call);
        CHECK(std::memcmp(want.data(), tensors[r].h.data(), want.size() * sizeof(want[0])) == 0);
      }
    }
  });
  for (int rank = 0; rank < size; ++rank) CHECK(world.record(rank).ready == 0);
}

// A row in an inbox is the codec's own message of that row, so what was said about words of a message holds here.
void a_row_in_transit_is_a_message_of_the_codec() {
  for (const uint64_t hidden : {1u, 33u, 300u}) {
    const auto x = values_of<numeric::Float32>(1, 5, 2 * hidden);
    Call call = {};
    call.x = x.data();
    call.elements = 2 * hidden;
    call.rows = 2;
    call.row_elements = hidden;
    for (int codec = PT_CODEC_INT8; codec <= PT_CODEC_MXFP4; ++codec) {
      std::vector<uint8_t> message(pt_codec_encoded_bytes(codec, 1, hidden));
      std::vector<Vector> sent(message.size() / sizeof(Vector), filled(0));
      CHECK(pt_codec_encode(codec, x.data() + hidden, nullptr, PT_FLOAT32, 1, hidden, message.data()) == PT_OK);
      codecs::with_codec(codec, [&](auto chosen) {
        using Payload = Coded<HostCoder<decltype(chosen)>, numeric::Float32>;
        for (uint32_t c = 0; c < Payload::packets(call, 1); ++c) {
          Payload::template store<Staged>(call, sent.data(), c, Payload::make(call, 1, c));
        }
      });
      CHECK(std::memcmp(message.data(), sent.data(), message.size()) == 0);
    }
  }
}

void the_algorithm_follows_from_what_travels() {
  Layout layout = {2, 2048, 1 << 16};
  const std::vector<uint16_t> x(2048), h(2048);
  pt_cuda_fusion_arguments a = {};
  a.struct_bytes = sizeof(a);
  a.dtype = PT_BFLOAT16;
  a.algorithm = PT_FUSION_AUTO;
  a.tokens = 2;
  a.hidden = 1024;
  a.x = x.data();
  a.h = const_cast<uint16_t*>(h.data());
  const Limits limits = {2048, 2048, 1 << 20};
  const auto algorithm_of = [&](uint32_t size, int codec, int asked) {
    layout.size = size;
    a.codec = codec;
    a.algorithm = asked;
    return make_plan(a, layout, limits, true).algorithm;
  };
  using enum Algorithm;
  const Algorithm of_two[] = {kTwoShot, kPull, kPull, kOneShot, kOneShot};
  const Algorithm of_three[] = {kTwoShot, kTwoShot, kTwoShot, kOneShot, kOneShot};
  for (int codec = PT_CODEC_NONE; codec <= PT_CODEC_MXFP4; ++codec) {
    CHECK(algorithm_of(2, codec, PT_FUSION_AUTO) == of_two[codec]);
    CHECK(algorithm_of(3, codec, PT_FUSION_AUTO) == of_three[codec]);
    CHECK(algorithm_of(3, codec, PT_FUSION_ENCODE_ONCE) == of_two[codec]);
  }
  // Without a codec the residual must be added before the one rounding; with one, everybody adds it to the decoded
  // mean.
  a.residual = x.data();
  CHECK(algorithm_of(3, PT_CODEC_NONE, PT_FUSION_AUTO) == kPull);
  CHECK(algorithm_of(3, PT_CODEC_INT8, PT_FUSION_AUTO) == kTwoShot);
  CHECK_CONTAINS(caught([&] { algorithm_of(3, PT_CODEC_INT8, PT_FUSION_NCCL); }).what(), "has no coded form");
}

// Zeros, although a residual could be added to what did not come.
void an_absent_rank_is_named_and_leaves_zeros() {
  using Type = numeric::Float32;
  const Case drawn = {Algorithm::kTwoShot, 5, 300, true, false, false};
  FusionWorld world(3, 1, 2, {3, 16384, 2560}, 2.0);
  Tensors<Type> tensors[3];
  Plan plans[3];
  world.run([&](int rank, HostTeam& team, const auto& kernel_boundary) {
    if (rank == 1) return;  // never comes
    if (kernel_boundary())
      plans[rank] = tensors[rank].prepare(PT_CODEC_INT8, PT_FLOAT32, drawn, rank, 1, world.layout());
    kernel_boundary();
    TwoShot<HostMemory, Coded<HostCoder<codecs::Int8>, Type>, 0>::run(world.channel(rank), plans[rank].call, team);
  });
  int timeouts = 0;
  for (const int rank : {0, 2}) {
    const Record& record = world.record(rank);
    CHECK(record.ready == 1 && record.algorithm == Algorithm::kTwoShot && record.phase == Phase::kFirst);
    if (record.failure == Failure::kTimeout) ++timeouts;
    if (record.failure == Failure::kTimeout) CHECK(record.peer == 1);
    for (const float value : tensors[rank].h) CHECK(value == 0.0f);
  }
  CHECK(timeouts >= 1);
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned calls = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 200;
  using numeric::Bfloat16, numeric::Float16, numeric::Float32;
  a_row_in_transit_is_a_message_of_the_codec();
  the_algorithm_follows_from_what_travels();
  an_absent_rank_is_named_and_leaves_zeros();
  every_rank_gets_the_bits_of_the_codec<codecs::Int8, Bfloat16, 0>(2, 2, 2, PT_BFLOAT16, calls);
  every_rank_gets_the_bits_of_the_codec<codecs::Fp8, Float16, 0>(4, 1, 2, PT_FLOAT16, calls);
  every_rank_gets_the_bits_of_the_codec<codecs::Int4, Float32, 8>(8, 2, 1, PT_FLOAT32, calls);
  every_rank_gets_the_bits_of_the_codec<codecs::Mxfp4, Bfloat16, 0>(3, 2, 1, PT_BFLOAT16, calls);
}
