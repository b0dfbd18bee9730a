// SPDX-License-Identifier: Apache-2.0
// Encode and decode on a CUDA device: pt_codec_encode and pt_codec_decode with device pointers and a stream. Not part
// of the C ABI: fusion kernels encode inside of themselves (lane.cuh); these serve tests and measurements.
#pragma once

#include <cuda_runtime_api.h>
#include <stddef.h>

namespace pt::codecs {

// cudaErrorInvalidValue for an unknown codec or type; otherwise what the launch returns. `encoded` is aligned to 16.
cudaError_t encode_on_device(int codec, const void* x, const void* base, int dtype, size_t rows, size_t hidden,
                             void* encoded, cudaStream_t stream) noexcept;
cudaError_t decode_on_device(int codec, const void* encoded, size_t rows, size_t hidden, float* values,
                             cudaStream_t stream) noexcept;

}  // namespace pt::codecs
