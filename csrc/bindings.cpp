// The pybind11 module bbfast._C. Importing it registers the operators (their torch layers are linked in); what it
// offers itself is a description of the build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "common/simd.h"

namespace py = pybind11;

namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

// The level that the loader chose on this processor; the same question the clones of common/simd.h ask.
std::string simd() {
#if BBFAST_HAS_CLONES
  __builtin_cpu_init();
#if BBFAST_SIMD_LEVEL >= 4
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
#endif
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
#endif
  return "default";
}

std::vector<std::string> simd_levels() {
  std::vector<std::string> levels;
#if BBFAST_HAS_CLONES
  if (BBFAST_SIMD_LEVEL >= 4) levels.push_back("x86-64-v4");
  levels.push_back("x86-64-v3");
#endif
  levels.push_back("default");
  return levels;
}

py::dict build_info() {
  const std::string cuda = BBFAST_CUDA_VERSION;
  py::dict info;
  info["version"] = BBFAST_VERSION;
  info["commit"] = BBFAST_COMMIT;
  info["compiler"] = compiler();
  info["built_with_torch"] = BBFAST_TORCH_VERSION;
  info["runs_with_torch"] = ">=2.10";
  info["cuda"] = cuda.empty() ? py::object(py::none()) : py::object(py::str(cuda));
  info["cuda_archs"] = split(BBFAST_CUDA_ARCHS);
  info["simd"] = simd();
  info["simd_levels"] = simd_levels();
  info["kernels"] = split(BBFAST_OPS);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native core of bbfast: registers torch.ops.bbfast.* when imported.";
  m.def("build_info", &build_info,
        "Version, commit, compiler, CUDA version and architectures, vector instructions, kernels.");
  m.def("kernels", [] { return split(BBFAST_OPS); }, "Names of the operators compiled in, sorted.");
}
