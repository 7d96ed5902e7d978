// The Python module taylor_kernels._native: integers in (pointers, sizes, a stream), nothing out;
// a C++ exception becomes a Python one. The order of the integers is that of the struct members in
// the headers; taylor_kernels/backends/native.py writes them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "common/conv2d_fisher.h"
#include "common/filter_moments.h"
#include "common/gate_gradients.h"
#include "common/hutchinson_moments.h"
#include "common/rademacher.h"
#include "common/second_order_moments.h"
#include "cpu/dispatch.h"

namespace {

namespace py = pybind11;
using NoGil = py::call_guard<py::gil_scoped_release>;
using Integers = std::vector<int64_t>;

template <typename T>
T* pointer(int64_t value) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(value));
}

tk::Conv2dFisherArgs conv2d_fisher_args(const Integers& v) {
  if (v.size() != 25) throw std::invalid_argument("conv2d_fisher: a torn record");
  return {pointer<void>(v[0]),
          pointer<void>(v[1]),
          pointer<void>(v[2]),
          pointer<void>(v[3]),
          v[4],
          v[5],
          v[6],
          v[7],
          v[8],
          v[9],
          v[10],
          v[11],
          v[12],
          v[13],
          v[14],
          v[15],
          v[16],
          v[17],
          v[18],
          v[19],
          static_cast<tk::DType>(v[20]),
          static_cast<tk::DType>(v[21]),
          static_cast<int32_t>(v[22]),
          static_cast<int32_t>(v[23]),
          static_cast<int32_t>(v[24])};
}

std::vector<tk::ParameterItem> parameter_items(const Integers& values) {
  constexpr size_t kMembers = 12;
  if (values.size() % kMembers) throw std::invalid_argument("parameters: a torn table");
  std::vector<tk::ParameterItem> items;
  items.reserve(values.size() / kMembers);
  for (auto v = values.begin(); v != values.end(); v += kMembers)
    items.push_back({pointer<void>(v[0]), pointer<void>(v[1]), pointer<void>(v[2]), v[3], v[4],
                     v[5], v[6], pointer<void>(v[7]), pointer<void>(v[8]),
                     static_cast<tk::DType>(v[9]), static_cast<int32_t>(v[10]),
                     static_cast<uint32_t>(v[11])});
  return items;
}

tk::GateGradientsArgs gate_gradients_args(const Integers& v) {
  if (v.size() != 9) throw std::invalid_argument("gate_gradients: a torn record");
  return {pointer<void>(v[0]),
          pointer<void>(v[1]),
          pointer<void>(v[2]),
          pointer<void>(v[3]),
          v[4],
          v[5],
          v[6],
          v[7],
          static_cast<tk::DType>(v[8])};
}

std::vector<tk::RademacherItem> rademacher_items(const Integers& values) {
  constexpr size_t kMembers = 4;
  if (values.size() % kMembers) throw std::invalid_argument("rademacher: a torn table");
  std::vector<tk::RademacherItem> items;
  items.reserve(values.size() / kMembers);
  for (auto v = values.begin(); v != values.end(); v += kMembers)
    items.push_back(
        {pointer<void>(v[0]), v[1], static_cast<tk::DType>(v[2]), static_cast<uint32_t>(v[3])});
  return items;
}

// An op over parameters, on the CPU. `More` are its integers beyond their table.
template <class... More>
void define_cpu(py::module_& m, const char* name,
                void (*run)(const tk::ParameterItem*, int64_t, int, More...)) {
  m.def(
      name,
      [run](const Integers& values, int threads, More... more) {
        auto items = parameter_items(values);
        run(items.data(), items.size(), threads, more...);
      },
      NoGil());
}

// The same in CUDA.
template <class... More>
void define_cuda(py::module_& m, const char* name,
                 int64_t (*workspace_size)(const tk::ParameterItem*, int64_t),
                 void (*run)(const tk::ParameterItem*, int64_t, void*, void*, More...)) {
  m.def((std::string(name) + "_workspace").c_str(), [workspace_size](const Integers& values) {
    auto items = parameter_items(values);
    return workspace_size(items.data(), items.size());
  });
  m.def(
      name,
      [run](const Integers& values, int64_t workspace, int64_t stream, More... more) {
        auto items = parameter_items(values);
        run(items.data(), items.size(), pointer<void>(workspace), pointer<void>(stream), more...);
      },
      NoGil());
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.attr("compiler") = TK_COMPILER;
  m.attr("cuda_version") = TK_CUDA_VERSION;  // empty: built without CUDA
  m.attr("cuda_architectures") = TK_CUDA_ARCHITECTURES;
  m.def("cpu_isa", &tk::cpu_isa);
  m.def("cpu_isas", &tk::cpu_isas);
  m.def("set_cpu_isa", &tk::set_cpu_isa);

  m.def(
      "conv2d_fisher_cpu",
      [](const Integers& values, int threads) {
        tk::conv2d_fisher_cpu(conv2d_fisher_args(values), threads);
      },
      NoGil());
  define_cpu(m, "filter_moments_cpu", &tk::filter_moments_cpu);
  m.def(
      "gate_gradients_cpu",
      [](const Integers& values, int threads) {
        tk::gate_gradients_cpu(gate_gradients_args(values), threads);
      },
      NoGil());
  define_cpu(m, "hutchinson_moments_cpu", &tk::hutchinson_moments_cpu);
  m.def(
      "rademacher_cpu",
      [](const Integers& values, int threads, uint64_t seed) {
        auto items = rademacher_items(values);
        tk::rademacher_cpu(items.data(), items.size(), threads, seed);
      },
      NoGil());
  define_cpu(m, "second_order_moments_cpu", &tk::second_order_moments_cpu);

#if defined(TK_CUDA)
  define_cuda(m, "filter_moments_cuda", &tk::filter_moments_cuda_workspace,
              &tk::filter_moments_cuda);
  m.def("gate_gradients_cuda_workspace", [](const Integers& values) {
    return tk::gate_gradients_cuda_workspace(gate_gradients_args(values));
  });
  m.def(
      "gate_gradients_cuda",
      [](const Integers& values, int64_t workspace, int64_t stream) {
        tk::gate_gradients_cuda(gate_gradients_args(values), pointer<void>(workspace),
                                pointer<void>(stream));
      },
      NoGil());
  m.def("conv2d_fisher_cuda_workspace", [](const Integers& values) {
    return tk::conv2d_fisher_cuda_workspace(conv2d_fisher_args(values));
  });
  m.def(
      "conv2d_fisher_cuda",
      [](const Integers& values, int64_t workspace, int64_t stream) {
        tk::conv2d_fisher_cuda(conv2d_fisher_args(values), pointer<void>(workspace),
                               pointer<void>(stream));
      },
      NoGil());
  define_cuda(m, "hutchinson_moments_cuda", &tk::hutchinson_moments_cuda_workspace,
              &tk::hutchinson_moments_cuda);
  m.def(
      "rademacher_cuda",
      [](const Integers& values, int64_t stream, uint64_t seed) {
        auto items = rademacher_items(values);
        tk::rademacher_cuda(items.data(), items.size(), pointer<void>(stream), seed);
      },
      NoGil());
  define_cuda(m, "second_order_moments_cuda", &tk::second_order_moments_cuda_workspace,
              &tk::second_order_moments_cuda);
#endif
}
