// What every torch layer needs: the stable ABI, errors that keep their Python type, and the parallel-for of torch's
// pool.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <string>

#include "common/errors.h"
#include "common/parallel.h"
#include "common/scalar.h"

namespace bbfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// STD_TORCH_CHECK throws std::runtime_error, which arrives in Python as RuntimeError. These arrive as ValueError and
// IndexError, so a caller can tell a bad argument from a failure.
#define BBFAST_CHECK_AS(raise, condition, ...)     \
  do {                                             \
    if (!(condition)) [[unlikely]]                 \
      bbfast::raise(bbfast::message(__VA_ARGS__)); \
  } while (0)
#define BBFAST_CHECK_VALUE(condition, ...) BBFAST_CHECK_AS(throw_value_error, condition, __VA_ARGS__)
#define BBFAST_CHECK_INDEX(condition, ...) BBFAST_CHECK_AS(throw_index_error, condition, __VA_ARGS__)

inline void torch_parallel(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << ']';
  return text.str();
}

// Calls `body` with a value of the kernel's element type for a floating dtype; `name` and `argument` are for the
// message.
template <class F>
void dispatch_float(ScalarType dtype, const char* name, const char* argument, F&& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Half:
      return body(Half{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    default:
      BBFAST_CHECK_VALUE(false, name, ": ", argument, " must be float16, bfloat16, float32 or float64, got ",
                         torch::headeronly::toString(dtype));
  }
}

// The same with uint8 as a further type: images as they are stored.
template <class F>
void dispatch_image(ScalarType dtype, const char* name, const char* argument, F&& body) {
  if (dtype == ScalarType::Byte) return body(uint8_t{});
  dispatch_float(dtype, name, argument, body);
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace bbfast
