// What is to be written into tensors again and again: made once, of indices, and then applied to
// the tensors of a model in one call, or to a gradient as it comes.
#pragma once

#include <pybind11/pybind11.h>

namespace tk {

void define_fills(pybind11::module_& m);

}  // namespace tk
