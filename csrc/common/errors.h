// Errors that keep their type on the way to Python.
#pragma once

#include <string>

namespace bbfast {

// Arrive in Python as ValueError and IndexError, under every version of torch (errors.cpp says how).
[[noreturn]] void throw_value_error(const std::string& message);
[[noreturn]] void throw_index_error(const std::string& message);

}  // namespace bbfast
