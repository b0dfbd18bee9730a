// SPDX-License-Identifier: Apache-2.0
// Marks functions that host and device compile from one source.
#pragma once

#if defined(__CUDACC__)
#define PT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PT_HOST_DEVICE inline
#endif

// Before a loop whose vectors must stay in registers.
#if defined(__CUDA_ARCH__)
#define PT_UNROLL _Pragma("unroll")
#else
#define PT_UNROLL
#endif
