// What every CUDA torch layer needs beside common/torch.h: the device guard, the current stream, the launch check.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "common/torch.h"

namespace bbfast {

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// common/torch.h dispatches on the CPU's bit-only 16-bit types; kernels on the device use CUDA's.
template <class T>
struct CudaType {
  using type = T;
};
template <>
struct CudaType<Half> {
  using type = __half;
};
template <>
struct CudaType<BFloat16> {
  using type = __nv_bfloat16;
};

template <class T>
using CudaElement = typename CudaType<T>::type;

}  // namespace bbfast
