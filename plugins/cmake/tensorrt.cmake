# SPDX-License-Identifier: Apache-2.0

# The TensorRT plugin is built where its headers are named, and says so. They include CUDA's.
if(NOT PT_TENSORRT_INCLUDE_DIR)
  message(STATUS "TensorRT plugin: OFF (set PT_TENSORRT_INCLUDE_DIR to the folder of NvInfer.h)")
elseif(NOT EXISTS "${PT_TENSORRT_INCLUDE_DIR}/NvInfer.h")
  message(FATAL_ERROR "PT_TENSORRT_INCLUDE_DIR is '${PT_TENSORRT_INCLUDE_DIR}': there is no NvInfer.h in it")
elseif(PT_SANITIZE)
  message(STATUS "TensorRT plugin: OFF (sanitizer build)")
else()
  find_package(CUDAToolkit REQUIRED)
  message(STATUS "TensorRT plugin: ON (${PT_TENSORRT_INCLUDE_DIR})")
  add_subdirectory(src/tensorrt)
endif()
