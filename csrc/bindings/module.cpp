// The Python module taylor_kernels._native. An op takes what taylor_kernels/layout.py describes and
// writes into its outputs; a C++ exception becomes a Python one.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/records.h"
#include "common/conv2d_fisher.h"
#include "common/filter_moments.h"
#include "common/gate_gradients.h"
#include "common/hutchinson_moments.h"
#include "common/rademacher.h"
#include "common/second_order_moments.h"
#include "cpu/dispatch.h"
#if defined(TK_CUDA)
#include "bindings/cuda_ops.h"
#endif

namespace tk {
namespace {

// An op over a list of records; `More` is its seed, or nothing.
template <class Item, class... More>
void define(py::module_& m, const char* name, void (*run)(const Item*, int64_t, int, More...)) {
  m.def(name, [run](const py::sequence& records, int threads, More... more) {
    const auto items = read_records<Item>(records);
    const py::gil_scoped_release no_gil;
    run(items.data(), static_cast<int64_t>(items.size()), threads, more...);
  });
}

// An op of one record.
template <class Args>
void define(py::module_& m, const char* name, void (*run)(const Args&, int)) {
  m.def(name, [run](py::handle record, int threads) {
    const auto args = read_record<Args>(record);
    const py::gil_scoped_release no_gil;
    run(args, threads);
  });
}

}  // namespace
}  // namespace tk

PYBIND11_MODULE(_native, m) {
  m.attr("compiler") = TK_COMPILER;
  m.attr("cuda_version") = TK_CUDA_VERSION;  // empty: built without CUDA
  m.attr("cuda_architectures") = TK_CUDA_ARCHITECTURES;
  m.def("cpu_isa", &tk::cpu_isa);
  m.def("cpu_isas", &tk::cpu_isas);
  m.def("set_cpu_isa", &tk::set_cpu_isa);
  tk::define_set_dtypes(m);

  tk::define(m, "conv2d_fisher_cpu", &tk::conv2d_fisher_cpu);
  tk::define(m, "filter_moments_cpu", &tk::filter_moments_cpu);
  tk::define(m, "gate_gradients_cpu", &tk::gate_gradients_cpu);
  tk::define(m, "hutchinson_moments_cpu", &tk::hutchinson_moments_cpu);
  tk::define(m, "rademacher_cpu", &tk::rademacher_cpu);
  tk::define(m, "second_order_moments_cpu", &tk::second_order_moments_cpu);
#if defined(TK_CUDA)
  tk::define_cuda_ops(m);
#endif
}
