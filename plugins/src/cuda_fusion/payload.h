// SPDX-License-Identifier: Apache-2.0
// How a row of x travels, packet by packet: a packet is what one thread makes, sends and receives at once. The
// protocols are templates over a payload:
//
//   Type, kValues        elements, and how many of them a packet carries
//   kLanes               threads that make packets together: 1, or a warp
//   packets(call, row)   of a row
//   make(call, row, c)   packet c of x; called by all kLanes threads, also past the end of the row
//   store, load          packet c of a row in transit, through Polled or Staged memory
//   is_missing(packet)   some word of it has not arrived
//   values(call, packet, c, out)   kValues floats
//   total(call, row, c, sums)      two-shot: what the owner of packet c sends of its sums; called like make
//   store_total(call, row, c, packet, arrived)   two-shot: store_packet from what the owner sent
//   load_sliced          two-shot: packet c of a row whose slices travel one after the other
#pragma once

#include "cuda_fusion/row.h"

namespace pt::cuda_fusion {
namespace {

// Inboxes: whoever reads looks for the sentinel.
template <typename Memory>
struct Polled {
  template <typename Unit>
  static PT_HOST_DEVICE Unit get(const Unit* from) {
    return Memory::load_relaxed(from);
  }
  template <typename Unit>
  static PT_HOST_DEVICE void put(Unit* to, const Unit& unit) {
    Memory::store_relaxed(to, unit);
  }
};

// Staging memory: ordered by flags.
struct Staged {
  template <typename Unit>
  static PT_HOST_DEVICE Unit get(const Unit* from) {
    return *from;
  }
  template <typename Unit>
  static PT_HOST_DEVICE void put(Unit* to, const Unit& unit) {
    *to = unit;
  }
};

// Ranks whose packets a thread reads at once, where their number is not known to the compiler.
constexpr uint32_t kPacketsAtOnce = 4;

// Adds a rank's packet to the sums; the caller goes through ranks in order, and rank 0 starts the sums.
template <typename Payload>
PT_HOST_DEVICE void add_packet(const Call& call, const typename Payload::Packet& packet, uint32_t rank, uint32_t c,
                               float* sums) {
  float values[Payload::kValues];
  Payload::values(call, packet, c, values);
  for (int i = 0; i < Payload::kValues; ++i) sums[i] = rank == 0 ? values[i] : add(sums[i], values[i]);
}

// Adds up packet `c` of all ranks, in their order; load(rank) brings it. kBatch are read at once.
template <typename Payload, uint32_t kBatch, typename Load>
PT_HOST_DEVICE void add_ranks(const Call& call, uint32_t num_ranks, uint32_t c, float* sums, const Load& load) {
  for (uint32_t first = 0; first < num_ranks; first += kBatch) {
    typename Payload::Packet packets[kBatch] = {};
    PT_UNROLL
    for (uint32_t i = 0; i < kBatch; ++i) {
      if (first + i >= num_ranks) break;
      packets[i] = load(first + i);
    }
    PT_UNROLL
    for (uint32_t i = 0; i < kBatch; ++i) {
      if (first + i < num_ranks) add_packet<Payload>(call, packets[i], first + i, c, sums);
    }
  }
}

// Stores the part of h that packet `c` is about: from the sums, or zeros when nothing came. Returns its squares, added
// up.
template <typename Payload>
PT_HOST_DEVICE float store_packet(const Call& call, uint64_t row, uint32_t c, float* sums, bool arrived) {
  using Type = typename Payload::Type;
  constexpr int kVectors = Payload::kValues / kPerVector<Type>;
  float squares = 0.0f;
  PT_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    const uint32_t at = c * kVectors + v;
    if (at >= call.vectors_in<Type>(row)) break;
    const Vector h = arrived ? finish_sum<Type>(call, row, at, sums + v * kPerVector<Type>) : filled(0);
    squares = add(squares, store_h<Type>(call, row, at, h));
  }
  return squares;
}

// The elements themselves, sixteen bytes a packet.
template <typename Element>
struct Plain {
  using Type = Element;
  using Packet = Vector;
  static constexpr int kValues = kPerVector<Type>;
  static constexpr uint32_t kLanes = 1;

  static PT_HOST_DEVICE uint32_t packets(const Call& call, uint64_t row) { return call.vectors_in<Type>(row); }
  static PT_HOST_DEVICE Packet make(const Call& call, uint64_t row, uint32_t c) {
    return without_sentinel(load_vector<Type>(call, call.x, row, c));
  }
  template <typename Access>
  static PT_HOST_DEVICE void store(const Call&, Vector* row_at, uint32_t c, const Packet& packet) {
    Access::put(row_at + c, packet);
  }
  template <typename Access>
  static PT_HOST_DEVICE Packet load(const Call&, const Vector* row_at, uint32_t c) {
    return Access::get(row_at + c);
  }
  static PT_HOST_DEVICE bool is_missing(const Packet& packet) { return has_sentinel(packet); }
  static PT_HOST_DEVICE void values(const Call&, const Packet& packet, uint32_t, float (&out)[kValues]) {
    for (int i = 0; i < kValues; ++i) out[i] = element<Type>(packet, i);
  }

  static PT_HOST_DEVICE Packet total(const Call& call, uint64_t row, uint32_t c, float (&sums)[kValues]) {
    return finish_sum<Type>(call, row, c, sums);
  }
  static PT_HOST_DEVICE float store_total(const Call& call, uint64_t row, uint32_t c, const Packet& packet,
                                          bool arrived) {
    return store_h<Type>(call, row, c, arrived ? packet : filled(0));
  }
  template <typename Access>
  static PT_HOST_DEVICE Packet load_sliced(const Call& call, const Vector* row_at, uint32_t c) {
    return load<Access>(call, row_at, c);
  }
};

// Codes of Coder's codec and their scales: a row in transit is what pt_codec_encode makes of [1, row_elements].
// Coder: WarpCoder (device_coder.cuh) or HostCoder (host_coder.h). Codecs make no word that equals the sentinel, so a
// packet has arrived when neither its words of codes nor its word of scales is one.
template <typename Coder, typename Element>
struct Coded {
  using Type = Element;
  using Packet = typename Coder::Packet;
  static constexpr int kValues = Coder::kValues;
  static constexpr uint32_t kLanes = Coder::kLanes;
  static constexpr int kVectors = kValues / kPerVector<Type>;
  static_assert(kEncodedAtOnce % (kLanes * kValues) == 0);

  static PT_HOST_DEVICE uint32_t packets(const Call& call, uint64_t) { return Coder::packets(groups(call)); }

  static PT_HOST_DEVICE Packet make(const Call& call, uint64_t row, uint32_t c) {
    float values[kValues];
    PT_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const uint32_t at = c * kVectors + v;
      const bool inside = at < call.vectors_in<Type>(row);
      const Vector x = inside ? load_vector<Type>(call, call.x, row, at) : filled(0);
      const Vector known = inside && call.delta ? load_vector<Type>(call, call.residual, row, at) : filled(0);
      PT_UNROLL
      for (int i = 0; i < kPerVector<Type>; ++i) {
        const float value = element<Type>(x, i);
        values[v * kPerVector<Type> + i] = call.delta ? add(value, -element<Type>(known, i)) : value;
      }
    }
    return Coder::encode(values, groups(call), c);
  }
  template <typename Access>
  static PT_HOST_DEVICE void store(const Call& call, Vector* row_at, uint32_t c, const Packet& packet) {
    Coder::template store<Access>(row_at->word, groups(call), c, packet);
  }
  template <typename Access>
  static PT_HOST_DEVICE Packet load(const Call& call, const Vector* row_at, uint32_t c) {
    return Coder::template load<Access>(row_at->word, groups(call), c);
  }
  static PT_HOST_DEVICE bool is_missing(const Packet& packet) { return Coder::is_missing(packet); }
  static PT_HOST_DEVICE void values(const Call& call, const Packet& packet, uint32_t c, float (&out)[kValues]) {
    Coder::decode(packet, groups(call), c, out);
  }

  // Encoded once more. The residual is added by everybody, to what they decode.
  static PT_HOST_DEVICE Packet total(const Call& call, uint64_t, uint32_t c, float (&sums)[kValues]) {
    PT_UNROLL
    for (int i = 0; i < kValues; ++i) sums[i] = multiply(sums[i], call.scale);
    return Coder::encode(sums, groups(call), c);
  }
  static PT_HOST_DEVICE float store_total(const Call& call, uint64_t row, uint32_t c, const Packet& packet,
                                          bool arrived) {
    Call scaled = call;
    scaled.scale = 1.0f;
    float sums[kValues];
    values(call, packet, c, sums);
    return store_packet<Coded>(scaled, row, c, sums, arrived);
  }
  template <typename Access>
  static PT_HOST_DEVICE Packet load_sliced(const Call& call, const Vector* row_at, uint32_t c) {
    const uint32_t slice_packets = call.slice_elements / kValues;
    const uint32_t slice = c / slice_packets;
    return load<Access>(call.of_slices(), row_at + slice * call.slice_vectors, c - slice * slice_packets);
  }

 private:
  static PT_HOST_DEVICE uint32_t groups(const Call& call) {
    return static_cast<uint32_t>((call.row_elements + Coder::kGroup - 1) / Coder::kGroup);
  }
};

}  // namespace
}  // namespace pt::cuda_fusion
