// Calls that are made of tensors themselves, which takes a tenth of the time that describing them
// in Python takes (records.h). What `define_plans` defines gives None where the tensors do not fit
// together, or do not lie as a kernel reads them: then Python says what is wrong, or copies.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>

#include "bindings/records.h"

namespace tk {

// A call whose outputs may not be known yet. It holds addresses: the tensors must outlive it.
template <class Call>
struct Plan {
  Call call;
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

void define_plans(py::module_& m);

}  // namespace tk
