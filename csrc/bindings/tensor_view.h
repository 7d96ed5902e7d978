// What a kernel needs to know of a torch.Tensor, read in one call of a C function: address, shape,
// strides, dtype and device. Those functions are DLPack's exchange API, which PyTorch offers from
// 2.10 on; its layout is fixed by DLPack's major version 1, so no header of either is needed.
// Without it no tensor can be viewed, and calls take the way through PyTorch's dispatcher.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>

#include "common/dtype.h"

namespace tk {

namespace py = pybind11;

namespace dlpack {

// Codes of DLPack: of devices, and of the kinds of a number.
constexpr int32_t kCpu = 1, kCuda = 2;
constexpr uint8_t kFloat = 2, kBfloat = 4;

struct Device {
  int32_t type;
  int32_t index;
};

struct Number {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t dimensions;
  Number number;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major;
  uint32_t minor;
  ExchangeApi* older;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*view_object)(void* object, Tensor* view);  // 0, or a Python exception is set
  void* current_stream;
};

}  // namespace dlpack

// The dimensions of a tensor, as they are or turned; a kernel's are at most five.
struct Dims {
  static constexpr int kMost = 5;
  int count = 0;
  int64_t size[kMost];
  int64_t stride[kMost];

  int64_t elements() const {
    int64_t product = 1;
    for (int d = 0; d < count; ++d) product *= size[d];
    return product;
  }

  // Whether the elements lie in memory without gaps, the last dimension innermost.
  bool contiguous() const {
    int64_t step = 1;
    for (int d = count - 1; d >= 0; --d) {
      if (size[d] != 1 && stride[d] != step) return false;
      step *= size[d];
    }
    return true;
  }

  // With one dimension moved to the end, which is how channels_last tensors are contiguous.
  Dims with_last(int moved) const {
    Dims turned;
    for (int d = 0; d < count; ++d) {
      if (d != moved) turned.add(size[d], stride[d]);
    }
    if (moved < count) turned.add(size[moved], stride[moved]);
    return turned;
  }

  void add(int64_t extent, int64_t step) {
    size[count] = extent;
    stride[count++] = step;
  }

  bool same_sizes(const Dims& other) const {
    bool same = count == other.count;
    for (int d = 0; same && d < count; ++d) same = size[d] == other.size[d];
    return same;
  }
};

struct TensorView {
  void* data;
  dlpack::Device device;
  DType dtype;
  Dims dims;

  bool on_device_of(const TensorView& other) const {
    return device.type == other.device.type && device.index == other.device.index;
  }
  bool like(const TensorView& other) const {
    return dtype == other.dtype && on_device_of(other) && dims.same_sizes(other.dims);
  }
};

// Views tensors of the classes that it is told of and of no other: a subclass may hold its values
// elsewhere. Set once, by set_exchange() from Python.
class Exchange {
  dlpack::ExchangeApi* api_ = nullptr;
  py::handle tensor_;
  py::handle parameter_;
  py::handle is_neg_;
  PyCFunction is_neg_function_ = nullptr;

  static std::optional<DType> dtype_of(dlpack::Number number) {
    if (number.lanes != 1) return {};
    if (number.code == dlpack::kBfloat && number.bits == 16) return DType::bf16;
    if (number.code != dlpack::kFloat) return {};
    if (number.bits == 32) return DType::f32;
    if (number.bits == 16) return DType::f16;
    if (number.bits == 64) return DType::f64;
    return {};
  }

  // Whether the values are those in memory with the sign turned, as those of x.conj().imag are:
  // DLPack does not tell, and such a tensor may lie without gaps, as one read from a file does.
  bool negated(PyObject* tensor) const {
    const auto answer = py::reinterpret_steal<py::object>(
        is_neg_function_ ? is_neg_function_(tensor, nullptr)
                         : PyObject_CallOneArg(is_neg_.ptr(), tensor));
    if (!answer) throw py::error_already_set();
    return answer.ptr() != Py_False;
  }

  // The C function of a method without arguments, or null. Call it with an instance of the method's
  // class alone: the method itself would check that. It takes a third less time than the method.
  static PyCFunction function_of(py::handle method) {
    if (!Py_IS_TYPE(method.ptr(), &PyMethodDescr_Type)) return nullptr;
    const PyMethodDef* def = reinterpret_cast<PyMethodDescrObject*>(method.ptr())->d_method;
    return def->ml_flags == METH_NOARGS ? def->ml_meth : nullptr;
  }

 public:
  // False: PyTorch's functions are not those that stand here.
  bool set(const py::capsule& capsule, const py::type& tensor, const py::type& parameter) {
    auto* api = static_cast<dlpack::ExchangeApi*>(capsule.get_pointer());
    while (api && api->major > 1) api = api->older;
    if (!api || api->major != 1 || !api->view_object) return false;
    api_ = api;
    tensor_ = py::object(tensor).release();
    parameter_ = py::object(parameter).release();
    is_neg_ = tensor.attr("is_neg").cast<py::object>().release();
    is_neg_function_ = function_of(is_neg_);
    return true;
  }

  // Of a tensor that a kernel could read where it lies, or nothing: not of those classes, of no
  // or other values, of more dimensions, empty.
  std::optional<TensorView> view(py::handle object) const {
    const auto type = py::handle(reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())));
    if (!api_ || (!type.is(tensor_) && !type.is(parameter_))) return {};
    dlpack::Tensor raw;
    if (api_->view_object(object.ptr(), &raw) != 0) {
      PyErr_Clear();  // a sparse, nested or wrapped tensor, which has no such address
      return {};
    }
    const auto dtype = dtype_of(raw.number);
    const bool readable = raw.device.type == dlpack::kCpu || raw.device.type == dlpack::kCuda;
    if (!raw.data || !raw.strides || !dtype || !readable || raw.dimensions < 1 ||
        raw.dimensions > Dims::kMost) {
      return {};
    }
    TensorView found{static_cast<char*>(raw.data) + raw.byte_offset, raw.device, *dtype, {}};
    for (int d = 0; d < raw.dimensions; ++d) found.dims.add(raw.shape[d], raw.strides[d]);
    if (found.dims.elements() == 0 || negated(object.ptr())) return {};
    return found;
  }
};

inline Exchange exchange;

}  // namespace tk
