// Calls that are made of tensors themselves, which takes a tenth of the time that describing them
// in Python takes (records.h). What is defined here gives None where the tensors do not fit
// together, or do not lie as a kernel reads them: then Python says what is wrong, or copies. On the
// CPU it makes the outputs and runs the kernels; what is to run on a GPU, or on no threads, it
// hands over as a plan.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <utility>

#include "bindings/libtorch.h"
#include "bindings/records.h"

namespace tk {

// A call whose outputs may not be known yet. It has addresses in tensors that must outlive it:
// those that `held` has no hold of are its caller's to keep.
template <class Call>
struct Plan {
  Call call;
  py::object held;
};

// The call of an op that was given a plan, or descriptions, which are read into `space`.
template <class Call>
const Call& call_of(py::handle given, uint64_t seed, uint32_t sums, Call& space) {
  const bool planned = py::isinstance<Plan<Call>>(given);
  if (!planned) read_call(given, space);
  Call& call = planned ? py::cast<Plan<Call>&>(given).call : space;
  if constexpr (requires { call.seed; }) {
    call.seed = seed;
    call.sums = sums;
  }
  return call;
}

// A plan with what Python needs to know to make its outputs: where, and whether in float64.
template <class Call>
py::object handed_over(Plan<Call> plan, const TensorView& like, py::object sizes) {
  return py::make_tuple(py::cast(std::move(plan)), like.on_gpu, like.device_index,
                        like.dtype == DType::f64, std::move(sizes));
}

// What sums over such a tensor come out as.
inline DType sums_of(const TensorView& tensor) {
  return tensor.dtype == DType::f64 ? DType::f64 : DType::f32;
}

// Runs an op whose one output has these sizes, and gives it.
template <class Call>
py::object call_one(void (*run)(const Call&, int), Call& call, const TensorView& like, int count,
                    const int64_t* sizes, int threads) {
  if (like.on_gpu || threads == 0) {
    return handed_over(Plan<Call>{call, {}}, like, tuple_of(sizes, count));
  }
  Made out = libtorch.empty(count, sizes, sums_of(like));
  call.out = out.data;
  const py::gil_scoped_release no_gil;
  run(call, threads);
  return std::move(out.tensor);
}

// An int that is no bool, from `least` on; products of two fit into 64 bits.
std::optional<int64_t> integer(PyObject* value, int64_t least);

// Those of the ops over parameters, and of those over activations.
void define_parameter_plans(py::module_& m);
void define_activation_plans(py::module_& m);

}  // namespace tk
