// The Python module taylor_kernels._native. An op takes a plan (plans.h) or what layout.py
// describes, and writes into its outputs; a C++ exception becomes a Python one.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/fills.h"
#include "bindings/libtorch.h"
#include "bindings/plans.h"
#include "common/ops.h"
#include "cpu/dispatch.h"
#if defined(TK_CUDA)
#include "bindings/cuda_ops.h"
#endif

namespace tk {
namespace {

template <class Call>
void define(py::module_& m, const char* name, void (*run)(const Call&, int)) {
  const auto read_and_run = [run](py::handle described, int threads, uint64_t seed, uint32_t sums) {
    Call space;
    const Call& call = call_of(described, seed, sums, space);
    const py::gil_scoped_release no_gil;
    run(call, threads);
  };
  m.def(name, read_and_run, py::arg("call"), py::arg("threads"), py::arg("seed") = 0,
        py::arg("sums") = UINT32_MAX);
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
  tk::define_libtorch(m);
  tk::define_parameter_plans(m);
  tk::define_activation_plans(m);
  tk::define_fills(m);

#define TK_DEFINE(op, Call) tk::define(m, #op "_cpu", &tk::op##_cpu);
  TK_OPS(TK_DEFINE)
#if defined(TK_CUDA)
  tk::define_cuda_ops(m);
#endif
}
