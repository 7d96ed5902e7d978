#include "bindings/fills.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
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

// Calls `use` with the elements of a tensor and the value, as what they are written as; a zero is
// of either half type.
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
    found.parts.reserve(fills.size());
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

  bool still_holds(uint64_t turn) const {
    return std::all_of(parts.begin(), parts.end(), [&](const auto& each) {
      const auto& [block, part] = each;
      return with_elements(tensor, part->value, [&](const auto* data, auto value) {
        return still_filled(data, block, part->chosen, value, turn);
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

// A tensor as it was when it was written to last: the object, where and how its values lie, and
// PyTorch's count of what has changed them since.
class Seen {
  py::object tensor_;  // a weak reference: nobody's memory is kept
  const void* data_ = nullptr;
  int64_t version_ = -1;  // PyTorch counts none
  std::array<int64_t, 2 * kMostDims> dims_{};

  static int64_t version_of(py::handle tensor) {
    static PyObject* const name = PyUnicode_InternFromString("_version");
    const auto version = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), name));
    if (version) return PyLong_AsLongLong(version.ptr());
    PyErr_Clear();  // one of torch.inference_mode()
    return -1;
  }

  static std::array<int64_t, 2 * kMostDims> numbers_of(const Dims& dims) {
    std::array<int64_t, 2 * kMostDims> found{};
    std::copy_n(dims.size, dims.count, found.begin());
    std::copy_n(dims.stride, dims.count, found.begin() + kMostDims);
    return found;
  }

  py::object alive() const { return tensor_ ? tensor_() : py::none(); }

 public:
  void note(py::handle tensor, const TensorView& view) {
    if (!alive().is(tensor)) tensor_ = py::weakref(tensor);
    data_ = view.data;
    version_ = version_of(tensor);
    dims_ = numbers_of(view.dims);
  }

  void forget() { version_ = -1; }

  // Whether this is the same tensor, with its values in the same memory.
  bool lies(py::handle tensor, const TensorView& view) const {
    return alive().is(tensor) && data_ == view.data && dims_ == numbers_of(view.dims);
  }

  // Whether nothing that PyTorch counts has changed the values.
  bool unchanged() const {
    const py::object tensor = alive();
    return version_ >= 0 && !tensor.is_none() && version_of(tensor) == version_;
  }
};

// What is to be written into tensors, and what is known of those that were written to; for Python
// and for hooks on gradients.
struct State {
  std::vector<Fills> fills;
  std::vector<Seen> tensors, gradients;
  std::vector<char> begun;  // tensors that were as they had been left when a step began

  explicit State(std::vector<Fills> all)
      : fills(std::move(all)),
        tensors(fills.size()),
        gradients(fills.size()),
        begun(fills.size(), 0) {}
};

py::object gradient_of(py::handle parameter) {
  static PyObject* const name = PyUnicode_InternFromString("grad");
  auto grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(parameter.ptr(), name));
  if (!grad) throw py::error_already_set();
  return grad;
}

// Zeroes the entries of a parameter's gradient as it comes; `other` does it where this cannot.
struct GradientHook {
  std::shared_ptr<State> state;
  size_t number;
  py::object other;

  void operator()(py::handle parameter) const {
    const py::object grad = gradient_of(parameter);
    if (grad.is_none()) return;
    if (const auto one = Written::of(grad, state->fills[number], true)) {
      one->write(true);
      state->gradients[number].note(grad, one->tensor);
    } else {
      state->gradients[number].forget();
      other(parameter);
    }
  }
};

// Elements of a tensor that is written to whether or not anything has changed it.
constexpr int64_t kSmall = 4096;

// What Python holds.
class HeldFills {
  std::shared_ptr<State> state_;
  uint64_t turn_ = 0;

  // Whether the entries of a tensor are as they were left, as far as PyTorch's counts tell; where a
  // step has been made since, if it was one that leaves them.
  bool is_kept(size_t i, py::handle tensor, const TensorView& view, bool stepped) const {
    if (!state_->tensors[i].lies(tensor, view)) return false;
    if (state_->tensors[i].unchanged()) return true;
    const auto& fills = state_->fills[i];
    const auto is_zero = [](const Fill& fill) { return fill.value == 0; };
    if (!stepped || !state_->begun[i] || !std::all_of(fills.begin(), fills.end(), is_zero))
      return false;
    const py::object grad = gradient_of(tensor);
    const auto seen = libtorch.view(grad);
    return seen && state_->gradients[i].lies(grad, *seen) && state_->gradients[i].unchanged();
  }

 public:
  explicit HeldFills(std::vector<Fills> all) : state_(std::make_shared<State>(std::move(all))) {}

  GradientHook gradient_hook(size_t number, py::object other) const {
    return {state_, number, std::move(other)};
  }

  // A step of an optimizer begins; whether it is one that leaves zeros at zero where gradients and
  // what it keeps itself are zero.
  void begin_step(bool keeps) {
    for (size_t i = 0; i < state_->fills.size(); ++i) {
      state_->begun[i] = keeps && state_->tensors[i].unchanged();
    }
  }

  // Writes into all tensors; the numbers of those that it cannot write into. A large one whose
  // entries are kept by all that PyTorch counts is looked at, and written to if that shows a
  // change: what is written by way of `.data` is not counted.
  std::vector<size_t> write(const py::list& tensors, bool stepped) {
    const auto& fills = state_->fills;
    if (fills.size() != tensors.size()) throw py::value_error("a tensor for each is needed");
    std::vector<std::pair<Written, bool>> written;
    std::vector<size_t> left;
    written.reserve(fills.size());
    for (size_t i = 0; i < fills.size(); ++i) {
      if (auto one = Written::of(tensors[i], fills[i], false)) {
        const TensorView view = one->tensor;
        const bool large = view.dims.elements() > kSmall;
        written.emplace_back(std::move(*one), large && is_kept(i, tensors[i], view, stepped));
        if (large) state_->tensors[i].note(tensors[i], view);
      } else {
        state_->tensors[i].forget();
        left.push_back(i);
      }
      state_->begun[i] = 0;
    }
    const uint64_t turn = ++turn_;
    const std::shared_ptr<const State> held = state_;  // of the indices
    const py::gil_scoped_release no_gil;
    for (const auto& [one, kept] : written) {
      if (!kept || !one.still_holds(turn)) one.write(false);
    }
    return left;
  }
};

}  // namespace

void define_fills(py::module_& m) {
  py::class_<HeldFills>(m, "Fills")
      .def(py::init([](const py::list& described) { return HeldFills(read_fills(described)); }))
      .def("write", &HeldFills::write, py::arg("tensors"), py::arg("stepped") = false)
      .def("begin_step", &HeldFills::begin_step)
      .def("gradient_hook", &HeldFills::gradient_hook);
  py::class_<GradientHook>(m, "GradientHook").def("__call__", &GradientHook::operator());
}

}  // namespace tk
