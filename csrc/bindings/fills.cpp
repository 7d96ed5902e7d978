#include "bindings/fills.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/libtorch.h"
#include "cpu/fill_entries.h"

namespace tk {
namespace {

// Of one tensor: a number for these indices of a dimension.
struct Fill {
  int dim;
  IndexRuns chosen;
  double value;
};
using Fills = std::vector<Fill>;

// How a tensor that fills its memory, in whatever order of dimensions, lies around one of them.
std::optional<Block> around(const Dims& dims, int dim) {
  int order[kMostDims];
  std::iota(order, order + dims.count, 0);
  std::stable_sort(order, order + dims.count,
                   [&](int a, int b) { return dims.stride[a] > dims.stride[b]; });
  Block block{1, dims.size[dim], 1};
  int64_t step = 1;
  bool inside = true;  // of the dimension that is looked for
  for (int i = dims.count - 1; i >= 0; --i) {
    const int d = order[i];
    if (d == dim) inside = false;
    if (dims.size[d] == 1) continue;
    if (dims.stride[d] != step) return {};
    step *= dims.size[d];
    if (d != dim) (inside ? block.inner : block.outer) *= dims.size[d];
  }
  return block;
}

template <class Element>
void fill(const TensorView& tensor, const Block& block, const IndexRuns& chosen, double value) {
  fill_entries(static_cast<Element*>(tensor.data), block, chosen, static_cast<Element>(value));
}

// A tensor that can be written to where it lies, and by what.
struct Written {
  TensorView tensor;
  std::vector<std::pair<Block, const Fill*>> parts;

  static std::optional<Written> of(py::handle object, const Fills& fills, bool zero) {
    const auto tensor = libtorch.view(object);
    if (!tensor || tensor->on_gpu) return {};
    const bool half = tensor->dtype == DType::f16 || tensor->dtype == DType::bf16;
    Written found{*tensor, {}};
    for (const Fill& fill : fills) {
      const bool inside =
          fill.dim < tensor->dims.count && fill.chosen.end <= tensor->dims.size[fill.dim];
      const auto block = inside ? around(tensor->dims, fill.dim) : std::nullopt;
      if (!block || (half && !zero && fill.value != 0)) return {};
      found.parts.emplace_back(*block, &fill);
    }
    return found;
  }

  void write(bool zero) const {
    for (const auto& [block, part] : parts) {
      const double value = zero ? 0.0 : part->value;
      switch (tensor.dtype) {
        case DType::f32:
          fill<float>(tensor, block, part->chosen, value);
          break;
        case DType::f64:
          fill<double>(tensor, block, part->chosen, value);
          break;
        default:
          fill<uint16_t>(tensor, block, part->chosen, 0.0);  // a zero of either half type
      }
    }
  }
};

// For each tensor its [(dimension, address of int64 indices, their number, value)].
std::vector<Fills> read_fills(const py::list& described) {
  std::vector<Fills> found;
  found.reserve(described.size());
  for (const py::handle tensor : described) {
    Fills& fills = found.emplace_back();
    for (const py::handle part : py::reinterpret_borrow<py::list>(tensor)) {
      const auto [dim, address, count, value] =
          part.cast<std::tuple<int, uintptr_t, int64_t, double>>();
      Fill& fill = fills.emplace_back(Fill{dim, {}, value});
      const auto* indices = reinterpret_cast<const int64_t*>(address);
      for (int64_t i = 0; i < count; ++i) fill.chosen.add(indices[i]);
    }
  }
  return found;
}

// Writes into all tensors; the numbers of those that it cannot write into.
std::vector<size_t> write(const std::vector<Fills>& fills, const py::list& tensors) {
  if (fills.size() != tensors.size()) throw py::value_error("a tensor for each is needed");
  std::vector<Written> written;
  std::vector<size_t> left;
  written.reserve(fills.size());
  for (size_t i = 0; i < fills.size(); ++i) {
    if (auto one = Written::of(tensors[i], fills[i], false)) {
      written.push_back(std::move(*one));
    } else {
      left.push_back(i);
    }
  }
  const py::gil_scoped_release no_gil;
  for (const Written& one : written) one.write(false);
  return left;
}

// Zeroes the entries of a parameter's gradient as it comes; `other` does it where this cannot.
struct GradientHook {
  std::shared_ptr<const std::vector<Fills>> fills;
  size_t number;
  py::object other;

  void operator()(py::handle parameter) const {
    static PyObject* const name = PyUnicode_InternFromString("grad");
    const auto grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(parameter.ptr(), name));
    if (!grad) throw py::error_already_set();
    if (grad.is_none()) return;
    if (const auto one = Written::of(grad, (*fills)[number], true)) {
      one->write(true);
    } else {
      other(parameter);
    }
  }
};

// What Python holds.
struct HeldFills {
  std::shared_ptr<const std::vector<Fills>> fills;
};

}  // namespace

void define_fills(py::module_& m) {
  py::class_<HeldFills>(m, "Fills")
      .def(py::init([](const py::list& described) {
        return HeldFills{std::make_shared<const std::vector<Fills>>(read_fills(described))};
      }))
      .def("write", [](const HeldFills& held,
                       const py::list& tensors) { return write(*held.fills, tensors); })
      .def("gradient_hook", [](const HeldFills& held, size_t number, py::object other) {
        return GradientHook{held.fills, number, std::move(other)};
      });
  py::class_<GradientHook>(m, "GradientHook").def("__call__", &GradientHook::operator());
}

}  // namespace tk
