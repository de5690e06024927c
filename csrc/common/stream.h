// The CUDA stream's type, declared so that an operator's header can be read without the CUDA headers.
#pragma once

struct CUstream_st;

namespace bbfast {

using CudaStream = CUstream_st*;

}  // namespace bbfast
