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

// Calls `use` with a pointer to a tensor's elements and a value of their type; of the half types,
// whose values are zeros, with their bits.
template <class Use>
auto with_elements(const TensorView& tensor, double value, const Use& use) {
  switch (tensor.dtype) {
    case DType::f32:
      return use(static_cast<float*>(tensor.data), static_cast<float>(value));
    case DType::f64:
      return use(static_cast<double*>(tensor.data), value);
    default:
      return use(static_cast<uint16_t*>(tensor.data), uint16_t{0});
  }
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
      with_elements(tensor, zero ? 0.0 : part->value, [&](auto* data, auto value) {
        fill_entries(data, block, part->chosen, value);
      });
    }
  }

  // Whether a look reads all entries.
  bool seen_whole() const {
    return std::all_of(parts.begin(), parts.end(),
                       [](const auto& one) { return one.first.outer * one.first.inner == 1; });
  }

  // Whether an entry of each index is as it was written.
  bool seems_written(uint32_t look) const {
    return std::all_of(parts.begin(), parts.end(), [&](const auto& one) {
      const auto& [block, part] = one;
      return with_elements(tensor, part->value, [&](auto* data, auto value) {
        return entries_seem(data, block, part->chosen, value, look);
      });
    });
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

// A tensor, and its version: a number that moves as most operations of PyTorch write into it, not
// those that fused optimizers are made of.
struct Version {
  PyObject* tensor = nullptr;  // not held: compared only
  const void* data = nullptr;
  int64_t number = -1;

  static Version of(py::handle tensor, const void* data) {
    static PyObject* const name = PyUnicode_InternFromString("_version");
    const auto number = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), name));
    const Version found{tensor.ptr(), data, number ? PyLong_AsLongLong(number.ptr()) : -1};
    PyErr_Clear();  // one that was made in inference mode has none
    return found;
  }

  bool same(const Version& other) const {
    return number >= 0 && number == other.number && lies_like(other);
  }
  bool lies_like(const Version& other) const {
    return tensor == other.tensor && data == other.data;
  }
};

// What Python holds: what to write, and how the last write left what it was written into.
class HeldFills {
 public:
  explicit HeldFills(const py::list& described)
      : fills_(std::make_shared<const std::vector<Fills>>(read_fills(described))),
        left_(fills_->size()) {}

  // Writes into all tensors; the numbers of those that it cannot write into.
  std::vector<size_t> write(const py::list& tensors, bool look, bool last) {
    if (fills_->size() != tensors.size()) throw py::value_error("a tensor for each is needed");
    std::vector<Written> written;
    std::vector<size_t> others;
    std::vector<Version> versions(tensors.size());
    bool same = look;
    written.reserve(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      auto one = Written::of(tensors[i], (*fills_)[i], false);
      if (!one) {
        others.push_back(i);
        continue;
      }
      if ((look || last) && !one->seen_whole()) {
        versions[i] = Version::of(tensors[i], one->tensor.data);
        same = same && versions[i].same(left_[i]);
      }
      written.push_back(std::move(*one));
    }
    // The lock of Python is kept: another thread that puts other memory into a parameter would free
    // what is written into here.
    const uint32_t number = looks_ += same;
    const bool spared =
        same && std::all_of(written.begin(), written.end(),
                            [&](const Written& one) { return one.seems_written(number); });
    if (!spared) {
      for (const Written& one : written) one.write(false);
    }
    if (last) remember(tensors, std::move(versions));
    writes_ += !spared;
    if (look && !spared) left_.assign(fills_->size(), {});  // what else changes them is not known
    return others;
  }

  GradientHook gradient_hook(size_t number, py::object other) const {
    return {fills_, number, std::move(other)};
  }

  int64_t writes() const { return writes_; }

 private:
  // Of memory that other processes write into no version tells, so none is kept.
  void remember(const py::list& tensors, std::vector<Version> versions) {
    for (size_t i = 0; i < versions.size(); ++i) {
      Version& one = versions[i];
      if (!one.tensor || (left_[i].number >= 0 && one.lies_like(left_[i]))) continue;
      if (tensors[i].attr("is_shared")().cast<bool>()) one.number = -1;
    }
    left_ = std::move(versions);
  }

  std::shared_ptr<const std::vector<Fills>> fills_;
  std::vector<Version> left_;
  uint32_t looks_ = 0;
  int64_t writes_ = 0;
};

}  // namespace

void define_fills(py::module_& m) {
  py::class_<HeldFills>(m, "Fills")
      .def(py::init<const py::list&>())
      .def("write", &HeldFills::write, py::arg("tensors"), py::arg("look") = false,
           py::arg("last") = false)
      .def("gradient_hook", &HeldFills::gradient_hook)
      .def_property_readonly("writes", &HeldFills::writes);
  py::class_<GradientHook>(m, "GradientHook").def("__call__", &GradientHook::operator());
}

}  // namespace tk
