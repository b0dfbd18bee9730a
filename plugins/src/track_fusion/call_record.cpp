// SPDX-License-Identifier: Apache-2.0
#include "track_fusion/call_record.h"

#include "codecs/message.h"
#include "common/error.h"

namespace pt::track_fusion {

const char* operation_name(Operation operation) {
  switch (operation) {
    case Operation::kNone:
      return "no operation";
    case Operation::kFuse:
      return "fuse";
    case Operation::kAllReduce:
      return "all_reduce";
    case Operation::kBroadcast:
      return "broadcast";
    case Operation::kGather:
      return "gather";
    case Operation::kBarrier:
      return "barrier";
    case Operation::kPoll:
      return "poll for the next call";
  }
  return "unknown operation";
}

const char* dtype_name(int dtype) {
  static constexpr const char* kNames[] = {"float32", "bfloat16", "float16"};
  return dtype >= 0 && dtype <= 2 ? kNames[dtype] : "unknown type";
}

size_t dtype_bytes(int dtype) { return dtype == PT_FLOAT32 ? 4 : 2; }

namespace {

std::string describe_codec(const CallRecord& record) {
  if (record.codec == PT_CODEC_NONE) return "";
  static constexpr const char* kAlgorithms[] = {"", " one-shot", " two-shot"};
  return format_text(", %s%s%s", codecs::codec_name(record.codec), kAlgorithms[record.algorithm],
                     record.delta ? " delta" : "");
}

}  // namespace

std::string describe(const CallRecord& record) {
  const char* name = operation_name(record.operation);
  const auto rows = static_cast<unsigned long long>(record.rows);
  const auto columns = static_cast<unsigned long long>(record.columns);
  switch (record.operation) {
    case Operation::kFuse:
      return format_text("%s(%s, %s [%llu, %llu]%s%s)", name, record.reduction == PT_MEAN ? "mean" : "sum",
                         dtype_name(record.dtype), rows, columns, record.has_residual ? ", residual" : "",
                         describe_codec(record).c_str());
    case Operation::kAllReduce:
      return format_text("%s(%s [%llu])", name, dtype_name(record.dtype), columns);
    case Operation::kBroadcast:
      return format_text("%s(%llu bytes, root %d)", name, columns, record.root);
    case Operation::kGather:
      return format_text("%s(%llu rows of %llu bytes, root %d)", name, rows, columns, record.root);
    case Operation::kBarrier:
    case Operation::kPoll:
    case Operation::kNone:
      break;
  }
  return name;
}

}  // namespace pt::track_fusion
