// SPDX-License-Identifier: Apache-2.0
// gpu_check OUTPUT.json [quick | nccl]: exit code 0 when every check was good. See scripts/gpu_check.sh.
#include <cstring>

#include "gpu_check/ranks.h"

using namespace pt::gpu_check;

namespace {

std::string describe_device() {
  cudaDeviceProp properties = {};
  GPU(cudaGetDeviceProperties(&properties, 0));
  int driver = 0, runtime = 0;
  GPU(cudaDriverGetVersion(&driver));
  GPU(cudaRuntimeGetVersion(&runtime));
  char line[512];
  std::snprintf(
      line, sizeof(line),
      R"({"device": "%s", "compute_capability": "%d.%d", "multiprocessors": %d, "driver": %d, "runtime": %d})",
      properties.name, properties.major, properties.minor, properties.multiProcessorCount, driver, runtime);
  return line;
}

template <typename Body>
double microseconds(int times, const Body& body) {
  cudaEvent_t begin = nullptr, end = nullptr;
  GPU(cudaEventCreate(&begin));
  GPU(cudaEventCreate(&end));
  body();
  GPU(cudaEventRecord(begin, nullptr));
  for (int i = 0; i < times; ++i) body();
  GPU(cudaEventRecord(end, nullptr));
  GPU(cudaEventSynchronize(end));
  float milliseconds = 0;
  GPU(cudaEventElapsedTime(&milliseconds, begin, end));
  GPU(cudaEventDestroy(begin));
  GPU(cudaEventDestroy(end));
  return milliseconds * 1e3 / times;
}

// What nothing can be faster than: the copy engine's bandwidth, and the time of a launch that does next to nothing.
void measure_limits(Report& report) {
  constexpr size_t kBytes = size_t{256} << 20;
  void *from = nullptr, *to = nullptr;
  GPU(cudaMalloc(&from, kBytes));
  GPU(cudaMalloc(&to, kBytes));
  const double copy_us = microseconds(20, [&] { GPU(cudaMemcpyAsync(to, from, kBytes, cudaMemcpyDeviceToDevice)); });
  const double launch_us = microseconds(1000, [&] { GPU(cudaMemsetAsync(to, 0, 16)); });
  GPU(cudaFree(from));
  GPU(cudaFree(to));
  char line[256];
  std::snprintf(line, sizeof(line), R"({"measure": "limits", "copy_gb_per_s": %.0f, "launch_us": %.2f})",
                2.0 * kBytes / copy_us / 1e3, launch_us);
  report.add(line);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: gpu_check OUTPUT.json [quick | nccl]\n");
    return 2;
  }
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "gpu_check: no GPU, or no driver for it\n");
    return 77;
  }
  const bool quick = argc > 2 && std::strcmp(argv[2], "quick") == 0;
  const bool nccl = argc > 2 && std::strcmp(argv[2], "nccl") == 0;
  Report report;
  report.add(describe_device());
  if (nccl) {
    check_streams(2, 200, true, report);
  } else {
    for (const int size : {2, 4, 8}) {
      check_cooperative(size, quick ? 8 : 20000, report);
      check_streams(size, quick ? 20 : 10000, false, report);
    }
    if (!quick) {
      check_nvls(1000, report);
      measure_limits(report);
      for (const int size : {2, 4, 8}) measure(size, report);
    }
  }
  FILE* file = std::fopen(argv[1], "w");
  if (file == nullptr || std::fprintf(file, "[\n%s\n]\n", report.json.c_str()) < 0 || std::fclose(file) != 0) {
    std::fprintf(stderr, "gpu_check: cannot write %s\n", argv[1]);
    return 2;
  }
  return report.failures == 0 ? 0 : 1;
}
