#include "bindings/cuda_ops.h"

#include "bindings/plans.h"
#include "common/ops.h"
#include "cuda/device_check.h"

namespace tk {
namespace {

void* stream_of(uintptr_t stream) { return reinterpret_cast<void*>(stream); }

// Calls launch(workspace) without the GIL. The stream may still use the workspace when its tensor
// is freed here: PyTorch gives the memory to later work of the same stream only.
template <class Launch>
void with_workspace(int64_t bytes, const py::function& allocate, const Launch& launch) {
  const py::object workspace = bytes ? allocate(bytes) : py::none();
  void* data = bytes ? data_of(workspace) : nullptr;
  const py::gil_scoped_release no_gil;
  launch(data);
}

template <class Call>
void define(py::module_& m, const char* name, int64_t (*workspace_bytes)(const Call&),
            void (*run)(const Call&, void*, void*)) {
  const auto read_and_run = [=](py::handle described, uintptr_t stream,
                                const py::function& allocate, uint64_t seed) {
    Call space;
    const Call& call = call_of(described, seed, space);
    with_workspace(workspace_bytes(call), allocate,
                   [&](void* workspace) { run(call, workspace, stream_of(stream)); });
  };
  m.def(name, read_and_run, py::arg("call"), py::arg("stream"), py::arg("allocate"),
        py::arg("seed") = 0);
}

}  // namespace

void define_cuda_ops(py::module_& m) {
  m.def("cuda_device_problem", &cuda_device_problem);
#define TK_DEFINE(op, Call) define(m, #op "_cuda", &op##_cuda_workspace, &op##_cuda);
  TK_OPS(TK_DEFINE)
}

}  // namespace tk
