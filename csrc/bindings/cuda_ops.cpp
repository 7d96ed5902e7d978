#include "bindings/cuda_ops.h"

#include "bindings/plans.h"
#include "common/ops.h"
#include "cuda/device_check.h"

namespace tk {
namespace {

// Runs without the GIL, but for what it asks of Python. The stream may still use the workspace when
// its tensor is freed here: PyTorch gives the memory to later work of the same stream only.
template <class Call>
void define(py::module_& m, const char* name, void (*run)(const Call&, const Allocate&, void*)) {
  const auto read_and_run = [=](py::handle described, uintptr_t stream,
                                const py::function& allocate, uint64_t seed) {
    Call space;
    const Call& call = call_of(described, seed, UINT32_MAX, space);
    py::object workspace;
    const py::gil_scoped_release no_gil;
    const auto in_python = [&](int64_t bytes) {
      const py::gil_scoped_acquire gil;
      workspace = allocate(bytes);
      return data_of(workspace);
    };
    run(call, in_python, reinterpret_cast<void*>(stream));
  };
  m.def(name, read_and_run, py::arg("call"), py::arg("stream"), py::arg("allocate"),
        py::arg("seed") = 0);
}

}  // namespace

void define_cuda_ops(py::module_& m) {
  m.def("cuda_device_problem", &cuda_device_problem);
#define TK_DEFINE(op, Call) define(m, #op "_cuda", &op##_cuda);
  TK_OPS(TK_DEFINE)
}

}  // namespace tk
