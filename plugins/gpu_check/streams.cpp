// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <memory>

#include "gpu_check/world.h"

namespace pt::gpu_check {
namespace {

struct Case {
  Case(int size, uint64_t tokens, uint64_t hidden, bool with_norm) : norm(with_norm) {
    for (int rank = 0; rank < size; ++rank) {
      owned.push_back(std::make_unique<Tensors>(rank, tokens, hidden, norm));
      ranks.push_back(owned.back().get());
    }
  }
  bool norm;
  std::vector<std::unique_ptr<Tensors>> owned;
  std::vector<const Tensors*> ranks;
};

// Median over batches, per replay.
double microseconds(World& world, cudaGraphExec_t graph) {
  cudaEvent_t begin = nullptr, end = nullptr;
  GPU(cudaEventCreate(&begin));
  GPU(cudaEventCreate(&end));
  std::vector<double> batches;
  for (int batch = 0; batch < 12; ++batch) {
    constexpr int kReplays = 50;
    GPU(cudaEventRecord(begin, world.first_stream()));
    for (int replay = 0; replay < kReplays; ++replay) GPU(cudaGraphLaunch(graph, world.first_stream()));
    GPU(cudaEventRecord(end, world.first_stream()));
    GPU(cudaEventSynchronize(end));
    float milliseconds = 0;
    GPU(cudaEventElapsedTime(&milliseconds, begin, end));
    if (batch >= 2) batches.push_back(milliseconds * 1e3 / kReplays);
  }
  std::sort(batches.begin(), batches.end());
  GPU(cudaEventDestroy(begin));
  GPU(cudaEventDestroy(end));
  return batches[batches.size() / 2];
}

const char* const kNames[] = {"one-shot", "pull", "two-shot", "nccl"};

}  // namespace

bool same_everywhere(const std::vector<const Tensors*>& ranks, bool norm, int algorithm, int codec, uint64_t* hash) {
  const std::vector<uint16_t> expected = Tensors::expected(ranks, algorithm, codec);
  const std::vector<uint16_t> normed = norm ? ranks[0]->normed() : expected;
  for (const Tensors* rank : ranks) {
    if (rank->h() != expected || (norm && rank->normed() != normed)) return false;
  }
  *hash = fnv1a(expected.data(), expected.size() * 2) ^ fnv1a(normed.data(), normed.size() * 2);
  return true;
}

namespace {

// Two graphs with different numbers of tokens in turn, and eager calls between them.
void check_one(World& world, int size, int algorithm, int codec, int replays, Report& report) {
  // Inboxes of eight ranks hold 256 KiB.
  Case small(size, 2, 4096, true), large(size, algorithm == PT_FUSION_ONE_SHOT ? 17 : 61, 4096, true);
  world.fuse(small.ranks, algorithm, codec);  // kernels are loaded before anything is captured
  world.fuse(large.ranks, algorithm, codec);
  world.finish();
  const bool graphs = algorithm != PT_FUSION_NCCL;  // whose ranks capture in threads of their own
  cudaGraphExec_t first = graphs ? world.capture(small.ranks, algorithm, codec) : nullptr;
  cudaGraphExec_t other = graphs ? world.capture(large.ranks, algorithm, codec) : nullptr;
  bool good = true;
  uint64_t hash = 0, hash_small = 0;
  for (int replay = 0; replay < replays && good; ++replay) {
    if (graphs && replay % 10 != 0) {
      GPU(cudaGraphLaunch(replay % 3 == 0 ? other : first, world.first_stream()));
    } else {
      // Streams do not know of the graph before: its end is waited for.
      GPU(cudaDeviceSynchronize());
      world.fuse(replay % 20 == 0 ? small.ranks : large.ranks, algorithm, codec);
      GPU(cudaDeviceSynchronize());
    }
    if (replay % 1000 == 999 || replay + 1 == replays) {
      world.finish();
      good = same_everywhere(small.ranks, true, algorithm, codec, &hash_small) &&
             same_everywhere(large.ranks, true, algorithm, codec, &hash);
    }
  }
  if (graphs) {
    GPU(cudaGraphExecDestroy(first));
    GPU(cudaGraphExecDestroy(other));
  }
  char line[256];
  std::snprintf(
      line, sizeof(line),
      R"({"check": "streams", "ranks": %d, "algorithm": "%s", "codec": "%s", "replays": %d, "hash": "%016llx", "good": %s})",
      size, kNames[algorithm], kCodecNames[codec], replays, static_cast<unsigned long long>(hash ^ hash_small),
      good ? "true" : "false");
  report.add(line, good);
}

void measure_one(World& world, const Case& fused, int size, int algorithm, int codec, uint64_t bytes, Report& report) {
  world.fuse(fused.ranks, algorithm, codec);
  world.finish();
  cudaGraphExec_t graph = world.capture(fused.ranks, algorithm, codec);
  const double us = microseconds(world, graph);
  world.finish();
  GPU(cudaGraphExecDestroy(graph));
  char line[256];
  std::snprintf(
      line, sizeof(line),
      R"({"measure": "fuse", "ranks": %d, "algorithm": "%s", "codec": "%s", "bytes": %llu, "norm": %s, "us": %.2f})",
      size, kNames[algorithm], kCodecNames[codec], static_cast<unsigned long long>(bytes),
      fused.norm ? "true" : "false", us);
  report.add(line);
}

}  // namespace

void check_streams(int size, int replays, bool nccl, Report& report) {
  World world(size, nccl);
  if (nccl) return check_one(world, size, PT_FUSION_NCCL, PT_CODEC_NONE, replays, report);
  for (const int algorithm : {PT_FUSION_ONE_SHOT, PT_FUSION_PULL, PT_FUSION_TWO_SHOT}) {
    for (int codec = PT_CODEC_NONE; codec <= PT_CODEC_MXFP4; ++codec) {
      check_one(world, size, algorithm, codec, codec == PT_CODEC_NONE ? replays : replays / 4, report);
    }
  }
}

void measure(int size, Report& report) {
  World world(size, false);
  constexpr uint64_t kHidden = 4096;
  for (uint64_t tokens = 1; tokens * kHidden * 2 <= uint64_t{64} << 20; tokens *= 4) {
    const uint64_t bytes = tokens * kHidden * 2;
    for (const bool norm : {false, true}) {
      const Case fused(size, tokens, kHidden, norm);
      for (int codec = PT_CODEC_NONE; codec <= PT_CODEC_MXFP4; ++codec) {
        const uint64_t sent = bytes_in_transit(codec, tokens, kHidden);
        for (const int algorithm : {PT_FUSION_ONE_SHOT, PT_FUSION_PULL, PT_FUSION_TWO_SHOT}) {
          if (algorithm == PT_FUSION_ONE_SHOT && sent > uint64_t{256} << 10) continue;
          measure_one(world, fused, size, algorithm, codec, bytes, report);
        }
      }
    }
  }
}

}  // namespace pt::gpu_check
