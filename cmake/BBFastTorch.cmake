# The installed torch, seen through its stable ABI: the include folder and the libraries to name in DT_NEEDED.
# torch's own find_package is not used: for a CUDA build it asks for toolkit libraries that we do not link.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
    "import importlib.util as u, importlib.metadata as m; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '', m.version('torch') if s else '', sep=';')"
  OUTPUT_VARIABLE BBFAST_TORCH_FOUND OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
list(GET BBFAST_TORCH_FOUND 0 BBFAST_TORCH_DIR)
list(GET BBFAST_TORCH_FOUND 1 BBFAST_TORCH_VERSION)
if(NOT EXISTS "${BBFAST_TORCH_DIR}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "bbfast needs torch >= 2.10 beside ${Python_EXECUTABLE}; found '${BBFAST_TORCH_DIR}'. "
    "Install torch first, or build without --no-build-isolation.")
endif()
message(STATUS "bbfast: torch ${BBFAST_TORCH_VERSION} in ${BBFAST_TORCH_DIR}")

# One build serves every torch from 2.10 on.
add_library(bbfast_torch_headers INTERFACE)
add_library(bbfast::torch ALIAS bbfast_torch_headers)
target_include_directories(bbfast_torch_headers SYSTEM INTERFACE "${BBFAST_TORCH_DIR}/include")
target_compile_definitions(bbfast_torch_headers INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)

# Named as needed libraries. A process that has imported torch has them loaded, and the names resolve to that copy; for one that
# has not, the run path points at torch where it is installed beside bbfast. Where the torch at hand has no CUDA, an empty
# library of the same name stands in for the linker, so that the CUDA kernels can be built beside a CPU torch; it is not installed.
foreach(part IN ITEMS cpu cuda)
  add_library(bbfast_torch_${part} INTERFACE)
  add_library(bbfast::torch_${part} ALIAS bbfast_torch_${part})
  set(library "${BBFAST_TORCH_DIR}/lib/libtorch_${part}.so")
  if(NOT EXISTS "${library}")
    file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/torch_${part}_stub.cpp" "")
    add_library(bbfast_stub_${part} SHARED "${CMAKE_CURRENT_BINARY_DIR}/torch_${part}_stub.cpp")
    set_target_properties(bbfast_stub_${part} PROPERTIES OUTPUT_NAME "torch_${part}")
    set(library bbfast_stub_${part})
  endif()
  target_link_libraries(bbfast_torch_${part} INTERFACE "${library}")
  target_link_options(bbfast_torch_${part} INTERFACE -Wl,--no-as-needed -Wl,--allow-shlib-undefined)
endforeach()
set(CMAKE_SKIP_BUILD_RPATH ON)
set(CMAKE_INSTALL_RPATH "$ORIGIN/../torch/lib")
