// The CUDA ops of the Python module; tests/backends/emulation builds a module of them for a CPU.
#pragma once

#include <pybind11/pybind11.h>

namespace tk {

// cuda_device_problem(), and the ops: each takes what layout.py describes, a stream,
// allocate(bytes) -> a tensor of workspace on the current device, and its seed if it has one.
void define_cuda_ops(pybind11::module_& m);

}  // namespace tk
