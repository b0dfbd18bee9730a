// SPDX-License-Identifier: Apache-2.0
#include "tensorrt/fields.h"

#include <cmath>
#include <cstring>
#include <stdexcept>

namespace pt::tensorrt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

[[noreturn]] void refuse(const std::string& text) { throw std::runtime_error("PtTrackFusion: " + text); }

template <typename Value>
Value read(const PluginField& field, PluginFieldType type) {
  if (field.data == nullptr || field.type != type || field.length != 1) {
    refuse("field '" + std::string(field.name) + "' has type " + std::to_string(static_cast<int>(field.type)) +
           " and length " + std::to_string(field.length) + ", expected type " + std::to_string(static_cast<int>(type)) +
           " and length 1");
  }
  Value value;
  std::memcpy(&value, field.data, sizeof(value));
  return value;
}

void require_flag(const char* name, int32_t value) {
  if (value != 0 && value != 1) refuse(std::string(name) + " is " + std::to_string(value) + ", expected 0 or 1");
}

}  // namespace

Fields Fields::parse(const nvinfer1::PluginFieldCollection& collection) {
  Fields fields;
  bool has_version = false;
  for (int32_t i = 0; i < collection.nbFields; ++i) {
    const PluginField& field = collection.fields[i];
    const std::string name = field.name;
    if (name == "version") {
      fields.version = read<int32_t>(field, PluginFieldType::kINT32);
      has_version = true;
    } else if (name == "channel") {
      if (field.data == nullptr || field.length < 1) refuse("field 'channel' is empty, expected a name");
      // Python passes strings without their end, C++ often with it.
      const auto* text = static_cast<const char*>(field.data);
      fields.channel.assign(text, ::strnlen(text, static_cast<size_t>(field.length)));
    } else if (name == "num_ranks") {
      fields.num_ranks = read<int32_t>(field, PluginFieldType::kINT32);
    } else if (name == "reduction") {
      fields.reduction = read<int32_t>(field, PluginFieldType::kINT32);
    } else if (name == "has_residual") {
      fields.has_residual = read<int32_t>(field, PluginFieldType::kINT32);
    } else if (name == "has_norm") {
      fields.has_norm = read<int32_t>(field, PluginFieldType::kINT32);
    } else if (name == "eps") {
      fields.eps = read<float>(field, PluginFieldType::kFLOAT32);
    } else if (name == "codec") {
      fields.codec = read<int32_t>(field, PluginFieldType::kINT32);
    } else {
      refuse("there is no field '" + name + "'");
    }
  }
  if (has_version && fields.version != kFieldsVersion) {
    refuse("the engine has fields of version " + std::to_string(fields.version) + ", this library reads " +
           std::to_string(kFieldsVersion) + "; build the engine again");
  }
  if (fields.channel.empty()) refuse("field 'channel' is missing");
  if (fields.num_ranks < 1) refuse("num_ranks is " + std::to_string(fields.num_ranks) + ", expected at least 1");
  if (fields.reduction != 0 && fields.reduction != 1) {
    refuse("reduction is " + std::to_string(fields.reduction) + ", expected 0 (mean) or 1 (sum)");
  }
  require_flag("has_residual", fields.has_residual);
  require_flag("has_norm", fields.has_norm);
  if (!std::isfinite(fields.eps) || fields.eps < 0) refuse("eps is " + std::to_string(fields.eps));
  if (fields.codec < PT_CODEC_NONE || fields.codec > PT_CODEC_MXFP4) {
    refuse("codec is " + std::to_string(fields.codec) +
           ", expected 0 (none), 1 (int8), 2 (fp8), 3 (int4) or 4 (mxfp4)");
  }
  return fields;
}

SerializedFields::SerializedFields(const Fields& fields)
    : entries_{{"version", &fields.version, PluginFieldType::kINT32, 1},
               {"channel", fields.channel.data(), PluginFieldType::kCHAR, static_cast<int32_t>(fields.channel.size())},
               {"num_ranks", &fields.num_ranks, PluginFieldType::kINT32, 1},
               {"reduction", &fields.reduction, PluginFieldType::kINT32, 1},
               {"has_residual", &fields.has_residual, PluginFieldType::kINT32, 1},
               {"has_norm", &fields.has_norm, PluginFieldType::kINT32, 1},
               {"eps", &fields.eps, PluginFieldType::kFLOAT32, 1},
               {"codec", &fields.codec, PluginFieldType::kINT32, 1}},
      collection_{static_cast<int32_t>(entries_.size()), entries_.data()} {}

}  // namespace pt::tensorrt
