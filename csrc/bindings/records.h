// Calls as Python describes them: the NamedTuples of taylor_kernels/layout.py become the structs of
// csrc/common. Members are read by name, so that neither side depends on the order of the other: a
// name that Python does not have is an AttributeError, a member that is not read here is an error
// of the compiler.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/ops.h"

namespace tk {

namespace py = pybind11;

// torch's dtypes, each at the place of its DType; set once, by set_dtypes() from Python.
inline std::array<py::handle, 4> torch_dtypes;

// The address of a tensor's first element.
inline void* data_of(py::handle tensor) {
  static PyObject* const name = PyUnicode_InternFromString("data_ptr");
  const auto address =
      py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), name));
  if (!address) throw py::error_already_set();
  void* data = PyLong_AsVoidPtr(address.ptr());
  if (!data && PyErr_Occurred()) throw py::error_already_set();
  return data;
}

// A struct for each NamedTuple of a sequence.
template <class Item>
std::vector<Item> read_items(py::handle records) {
  const auto sequence = py::cast<py::sequence>(records);
  std::vector<Item> items(sequence.size());
  size_t i = 0;
  for (const py::handle record : sequence) read(record, items[i++]);
  return items;
}

// A member of a NamedTuple, which becomes what the struct's member is: a tensor or None a pointer,
// an int or a float a number, a dtype a DType, a pair of ints an Extent2d, a list of NamedTuples a
// vector.
class Member {
  py::object value_;

  static int64_t integer(PyObject* value) {
    const int64_t number = PyLong_AsLongLong(value);
    if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
    return number;
  }

 public:
  Member(py::handle record, PyObject* name)
      : value_(py::reinterpret_steal<py::object>(PyObject_GetAttr(record.ptr(), name))) {
    if (!value_) throw py::error_already_set();
  }

  operator void*() const { return value_.is_none() ? nullptr : data_of(value_); }
  operator const void*() const { return static_cast<void*>(*this); }
  operator int64_t() const { return integer(value_.ptr()); }
  operator double() const {
    const double number = PyFloat_AsDouble(value_.ptr());
    if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
    return number;
  }
  operator bool() const { return integer(value_.ptr()) != 0; }

  operator uint32_t() const {
    const int64_t number = integer(value_.ptr());
    if (number < 0 || number > UINT32_MAX) throw py::value_error("not a number of 32 bits");
    return static_cast<uint32_t>(number);
  }

  operator DType() const {
    for (size_t i = 0; i < torch_dtypes.size(); ++i) {
      if (value_.is(torch_dtypes[i])) return static_cast<DType>(i);
    }
    throw py::type_error("no kernel reads " + std::string(py::str(value_)));
  }

  operator Extent2d() const {
    if (!PyTuple_Check(value_.ptr()) || PyTuple_GET_SIZE(value_.ptr()) != 2) {
      throw py::type_error("not a pair: " + std::string(py::str(value_)));
    }
    return {integer(PyTuple_GET_ITEM(value_.ptr(), 0)), integer(PyTuple_GET_ITEM(value_.ptr(), 1))};
  }

  template <class Item>
  operator std::vector<Item>() const {
    return read_items<Item>(value_);
  }
};

// The member `name` of the struct, from that of `record`.
#define TK_MEMBER(name)                                                  \
  .name = Member(record, [] {                                            \
    static PyObject* const interned = PyUnicode_InternFromString(#name); \
    return interned;                                                     \
  }())

inline void read(py::handle record, ParameterItem& item) {
  item = {TK_MEMBER(weight),   TK_MEMBER(grad),   TK_MEMBER(hvp),           TK_MEMBER(rows),
          TK_MEMBER(channels), TK_MEMBER(kernel), TK_MEMBER(groups),        TK_MEMBER(row_out),
          TK_MEMBER(col_out),  TK_MEMBER(dtype),  TK_MEMBER(channels_last), TK_MEMBER(stream)};
}

inline void read(py::handle record, RademacherItem& item) {
  item = {TK_MEMBER(out), TK_MEMBER(elements), TK_MEMBER(dtype), TK_MEMBER(stream)};
}

inline void read(py::handle record, MirrorItem& item) {
  item = {TK_MEMBER(param),  TK_MEMBER(grad),      TK_MEMBER(value),     TK_MEMBER(first),
          TK_MEMBER(second), TK_MEMBER(elements),  TK_MEMBER(dtype),     TK_MEMBER(projection),
          TK_MEMBER(levels), TK_MEMBER(update),    TK_MEMBER(direction), TK_MEMBER(rounded),
          TK_MEMBER(rate),   TK_MEMBER(decay),     TK_MEMBER(decay2),    TK_MEMBER(eps),
          TK_MEMBER(beta),   TK_MEMBER(next_beta), TK_MEMBER(scale),     TK_MEMBER(weight_decay)};
}

inline void read(py::handle record, ScoreItem& item) {
  item = {TK_MEMBER(a), TK_MEMBER(b), TK_MEMBER(elements), TK_MEMBER(dtype), TK_MEMBER(ranked)};
}

inline void read(py::handle record, GlobalThresholdArgs& args) {
  args = {TK_MEMBER(table), TK_MEMBER(items), TK_MEMBER(wanted), TK_MEMBER(is_signed)};
}

inline void read(py::handle record, MomentumItem& item) {
  item = {TK_MEMBER(weight),   TK_MEMBER(grad),         TK_MEMBER(momentum), TK_MEMBER(row_scores),
          TK_MEMBER(elements), TK_MEMBER(row_elements), TK_MEMBER(first),    TK_MEMBER(dtype),
          TK_MEMBER(ranked),   TK_MEMBER(lr),           TK_MEMBER(decay),    TK_MEMBER(beta)};
}

inline void read(py::handle record, SparseMomentumArgs& args) {
  args = {TK_MEMBER(table), TK_MEMBER(items)};
}

inline void read(py::handle record, GateGradientsArgs& args) {
  args = {TK_MEMBER(output),   TK_MEMBER(grad_output), TK_MEMBER(bias),
          TK_MEMBER(out),      TK_MEMBER(batch),       TK_MEMBER(outer),
          TK_MEMBER(channels), TK_MEMBER(inner),       TK_MEMBER(dtype)};
}

inline void read(py::handle record, Conv2dFisherArgs& args) {
  args = {TK_MEMBER(input),
          TK_MEMBER(grad_output),
          TK_MEMBER(weight),
          TK_MEMBER(out),
          TK_MEMBER(batch),
          TK_MEMBER(groups),
          TK_MEMBER(channels),
          TK_MEMBER(filters),
          TK_MEMBER(image),
          TK_MEMBER(out_image),
          TK_MEMBER(kernel),
          TK_MEMBER(stride),
          TK_MEMBER(padding),
          TK_MEMBER(dilation),
          TK_MEMBER(dtype),
          TK_MEMBER(weight_dtype),
          TK_MEMBER(input_channels_last),
          TK_MEMBER(grad_channels_last),
          TK_MEMBER(tf32)};
}

#undef TK_MEMBER

// The call of an op: a record, or a sequence of them.
template <class Record>
void read_call(py::handle record, Record& call) {
  read(record, call);
}

template <class Item>
void read_call(py::handle records, ItemList<Item>& call) {
  call.items = read_items<Item>(records);
}

inline void define_set_dtypes(py::module_& m) {
  m.def(
      "set_dtypes",
      [](py::object f32, py::object f16, py::object bf16, py::object f64) {
        const auto set = [](DType dtype, py::object& value) {
          torch_dtypes[static_cast<size_t>(dtype)] = value.release();
        };
        set(DType::f32, f32);
        set(DType::f16, f16);
        set(DType::bf16, bf16);
        set(DType::f64, f64);
      },
      py::kw_only(), py::arg("f32"), py::arg("f16"), py::arg("bf16"), py::arg("f64"));
}

}  // namespace tk
