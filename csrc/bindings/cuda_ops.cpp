#include "bindings/cuda_ops.h"

#include "bindings/records.h"
#include "common/conv2d_fisher.h"
#include "common/filter_moments.h"
#include "common/gate_gradients.h"
#include "common/hutchinson_moments.h"
#include "common/rademacher.h"
#include "common/second_order_moments.h"
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

// An op over a list of records; `More` is its seed, or nothing.
template <class Item, class... More>
void define(py::module_& m, const char* name, int64_t (*workspace_bytes)(const Item*, int64_t),
            void (*run)(const Item*, int64_t, void*, void*, More...)) {
  m.def(name, [=](const py::sequence& records, uintptr_t stream, const py::function& allocate,
                  More... more) {
    const auto items = read_records<Item>(records);
    const auto count = static_cast<int64_t>(items.size());
    with_workspace(workspace_bytes(items.data(), count), allocate, [&](void* workspace) {
      run(items.data(), count, workspace, stream_of(stream), more...);
    });
  });
}

// An op of one record.
template <class Args>
void define(py::module_& m, const char* name, int64_t (*workspace_bytes)(const Args&),
            void (*run)(const Args&, void*, void*)) {
  m.def(name, [=](py::handle record, uintptr_t stream, const py::function& allocate) {
    const auto args = read_record<Args>(record);
    with_workspace(workspace_bytes(args), allocate,
                   [&](void* workspace) { run(args, workspace, stream_of(stream)); });
  });
}

}  // namespace

void define_cuda_ops(py::module_& m) {
  m.def("cuda_device_problem", &cuda_device_problem);
  define(m, "conv2d_fisher_cuda", &conv2d_fisher_cuda_workspace, &conv2d_fisher_cuda);
  define(m, "filter_moments_cuda", &filter_moments_cuda_workspace, &filter_moments_cuda);
  define(m, "gate_gradients_cuda", &gate_gradients_cuda_workspace, &gate_gradients_cuda);
  define(m, "hutchinson_moments_cuda", &hutchinson_moments_cuda_workspace,
         &hutchinson_moments_cuda);
  define(m, "second_order_moments_cuda", &second_order_moments_cuda_workspace,
         &second_order_moments_cuda);
  m.def("rademacher_cuda", [](const py::sequence& records, uintptr_t stream, const py::function&,
                              uint64_t seed) {
    const auto items = read_records<RademacherItem>(records);
    const py::gil_scoped_release no_gil;
    rademacher_cuda(items.data(), static_cast<int64_t>(items.size()), stream_of(stream), seed);
  });
}

}  // namespace tk
