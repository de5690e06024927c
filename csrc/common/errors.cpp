// A unit of its own, because the headers of torch's stable ABI and pybind11's cannot be included together.
//
// torch's binding lets pybind11's exceptions through in every version. std::invalid_argument became ValueError only
// until torch 2.14; since 2.15 it becomes RuntimeError.
#include "common/errors.h"

#include <pybind11/detail/common.h>

namespace bbfast {

void throw_value_error(const std::string& message) {
  throw pybind11::value_error(message);
}

void throw_index_error(const std::string& message) {
  throw pybind11::index_error(message);
}

}  // namespace bbfast
