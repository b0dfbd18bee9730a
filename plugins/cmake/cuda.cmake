# SPDX-License-Identifier: Apache-2.0

# Sets PT_HAVE_CUDA. A build without CUDA has everything but the kernels.
set(PT_HAVE_CUDA OFF)
if(NOT PT_ENABLE_CUDA MATCHES "^(ON|OFF|AUTO)$")
  message(FATAL_ERROR "PT_ENABLE_CUDA is '${PT_ENABLE_CUDA}', expected ON, OFF or AUTO")
endif()
if(NOT PT_ENABLE_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  set(CMAKE_CUDA_ARCHITECTURES ${PT_CUDA_ARCHITECTURES})
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    set(CMAKE_CUDA_STANDARD 17)  # CMake 3.25 knows no later one for nvcc 13
    set(CMAKE_CUDA_STANDARD_REQUIRED ON)
    find_package(CUDAToolkit REQUIRED)
    set(PT_HAVE_CUDA ON)
  elseif(PT_ENABLE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "PT_ENABLE_CUDA is ON and no working nvcc was found; install the CUDA toolkit, or configure with "
                        "-DPT_ENABLE_CUDA=OFF")
  endif()
endif()
message(STATUS "CUDA kernels: ${PT_HAVE_CUDA}")

# For kernels without an instruction that only newer targets have: one PTX, of the oldest target, is assembled for all of
# them. Making PTX is more than half of the compiler's work. Targets like "native" are left to CMake.
function(pt_compile_one_ptx target)
  if(NOT PT_CUDA_ARCHITECTURES MATCHES "^[0-9]+[af]?(;[0-9]+[af]?)*$")
    return()
  endif()
  set(oldest ${PT_CUDA_ARCHITECTURES})
  list(SORT oldest COMPARE NATURAL)
  list(GET oldest 0 oldest)
  string(REGEX REPLACE "[af]$" "" oldest ${oldest})  # sm_90a's own PTX runs nowhere else
  list(TRANSFORM PT_CUDA_ARCHITECTURES PREPEND "sm_" OUTPUT_VARIABLE codes)
  list(JOIN codes "," codes)
  set_target_properties(${target} PROPERTIES CUDA_ARCHITECTURES OFF)
  target_compile_options(${target} PRIVATE "--generate-code=arch=compute_${oldest},code=[compute_${oldest},${codes}]")
endfunction()
