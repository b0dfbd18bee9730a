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
