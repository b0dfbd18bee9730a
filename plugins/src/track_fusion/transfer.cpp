// SPDX-License-Identifier: Apache-2.0
// Collectives that move bytes: broadcast, gather, barrier.
#include <algorithm>
#include <cstring>

#include "track_fusion/group.h"

namespace pt::track_fusion {
namespace {

// Bytes [begin, begin + count) of one rank's [rows, row_bytes] go to its columns of out [rows, size * row_bytes].
void scatter_rows(const std::byte* source, size_t begin, size_t count, size_t row_bytes, int rank, int size,
                  std::byte* out) {
  const size_t out_row_bytes = row_bytes * static_cast<size_t>(size);
  std::byte* columns = out + row_bytes * static_cast<size_t>(rank);
  while (count > 0) {
    const size_t row = begin / row_bytes;
    const size_t column = begin % row_bytes;
    const size_t width = std::min(count, row_bytes - column);
    std::memcpy(columns + row * out_row_bytes + column, source, width);
    source += width;
    begin += width;
    count -= width;
  }
}

}  // namespace

void Group::broadcast(void* buffer, size_t bytes, int root, double timeout_s) {
  const CallRecord record = {.operation = Operation::kBroadcast, .root = static_cast<uint8_t>(root), .columns = bytes};
  run(record, timeout_s, [&] {
    auto* data = static_cast<std::byte*>(buffer);
    size_t done = 0;
    do {
      const size_t count = std::min(capacity_, bytes - done);
      begin_step();
      if (rank_ == root && count > 0) std::memcpy(inbox(rank_), data + done, count);
      post();
      if (rank_ != root) {
        await(root);
        if (count > 0) std::memcpy(data + done, inbox(root), count);
      }
      done += count;
    } while (done < bytes);
  });
}

void Group::gather(const void* in, size_t rows, size_t row_bytes, void* out, int root, double timeout_s) {
  const CallRecord record = {
      .operation = Operation::kGather, .root = static_cast<uint8_t>(root), .rows = rows, .columns = row_bytes};
  run(record, timeout_s, [&] {
    const auto* data = static_cast<const std::byte*>(in);
    auto* target = static_cast<std::byte*>(out);
    const size_t bytes = rows * row_bytes;
    size_t done = 0;
    do {
      const size_t count = std::min(capacity_, bytes - done);
      begin_step();
      if (rank_ != root && count > 0) std::memcpy(inbox(rank_), data + done, count);
      post();
      if (rank_ == root) {
        scatter_rows(data + done, done, count, row_bytes, rank_, size_, target);
        for (int rank = 0; rank < size_; ++rank) {
          if (rank == root) continue;
          await(rank);
          scatter_rows(inbox(rank), done, count, row_bytes, rank, size_, target);
        }
      }
      done += count;
    } while (done < bytes);
  });
}

void Group::barrier(double timeout_s) {
  run(CallRecord{.operation = Operation::kBarrier}, timeout_s, [&] {
    begin_step();
    post();
    await_all();
  });
}

}  // namespace pt::track_fusion
