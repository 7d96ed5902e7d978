// What calls ask of PyTorch beneath Python: to view a tensor (20 ns, where a method of Python's
// class takes 100), and to make one (half a microsecond, where torch.empty takes two).
//
// The functions are those of the C interface that PyTorch keeps for code compiled elsewhere, whose
// names begin with aoti_torch_, and two of C++ (libtorch.cpp). They are looked up by name in the
// libraries that torch._C has loaded, so that neither a header nor a library of PyTorch is needed
// to build, and tried on a few tensors before they are trusted. Where PyTorch has not got them, or
// one of them says otherwise than Python does, no tensor can be viewed, and calls take the way
// through PyTorch's dispatcher.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "bindings/tensor_view.h"

namespace tk {

namespace py = pybind11;

// A tuple of ints.
py::tuple tuple_of(const int64_t* numbers, int count);

// A tensor, and where its first element lies.
struct Made {
  py::object tensor;
  void* data;
};

class LibTorch {
 public:
  // Of Python: torch's classes Tensor and Parameter, torch.empty, and what says whether memory is
  // to be filled when it is allocated, which torch.empty does and C functions do not.
  struct Python {
    py::handle tensor, parameter, empty, fills_memory;
  };

  // True: everything was found in the libraries of the extension module at this path, views of
  // `samples` say what their attributes say, and the values of `negated` are known to be so.
  bool connect(const std::string& module, const Python& python, const py::list& samples,
               const py::list& negated);

  // Views a tensor of those two classes that a kernel could read where it lies. False: it is of
  // another class, which may hold its values elsewhere, has none or other values, more dimensions,
  // or is empty.
  bool read(PyObject* object, TensorView& found) const;

  // The same, or nothing.
  std::optional<TensorView> view(py::handle object) const {
    std::optional<TensorView> found(std::in_place);
    if (!read(object.ptr(), *found)) found.reset();
    return found;
  }

  // A new tensor of `count` dimensions on the CPU, without values.
  Made empty(int count, const int64_t* sizes, DType dtype) const;

  // The rows of a table, cut into parts of so many rows one after the other: tensors in its memory.
  // Autograd knows nothing of the table and its parts.
  py::list split(py::handle table, const Dims& dims, const std::vector<int64_t>& rows) const;

 private:
  using Handle = void*;  // the address of an at::Tensor
  // An at::Tensor as functions return it. Its word is returned as that of a class with a destructor
  // is, which is empty here: what holds a tensor is left to `take`.
  struct Returned {
    void* word;
    ~Returned() {}
  };
  struct Sizes {  // an at::IntArrayRef
    const int64_t* first;
    size_t count;
  };
  template <typename T>
  using Get = int (*)(Handle, T*);  // all of these return 0, or else the tensor has no such thing

  struct Functions {
    Get<int32_t> layout, device_type, device_index, dtype;
    Get<int64_t> dim;
    Get<const int64_t*> sizes, strides;
    Get<void*> data;
    int (*empty_strided)(int64_t count, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                         int32_t device_type, int32_t device_index, Handle* made);
    int (*alias)(Handle, int64_t count, const int64_t* sizes, const int64_t* strides,
                 int64_t offset, Handle* made);
    int (*destroy)(Handle);
    bool (*is_neg)(Handle);     // of C++, which passes a reference as an address
    PyObject* (*wrap)(Handle);  // likewise
    // Of C++ too, and not there in every PyTorch: what `alias` and `wrap` do without memory for a
    // handle. The second takes the tensor out of its place.
    Returned (*as_strided)(Handle, Sizes sizes, Sizes strides, std::optional<int64_t> offset);
    PyObject* (*take)(Returned*);
  };

  bool find(const std::string& module);
  bool find_handles(const py::list& samples);
  bool sees(py::handle sample) const;
  bool makes() const;
  bool splits(const Made& table) const;
  Handle handle_of(PyObject* tensor) const { return reinterpret_cast<char*>(tensor) + handle_at_; }
  py::object to_python(Handle made) const;
  py::object part(Handle table, Sizes sizes, Sizes strides, int64_t offset) const;

  bool connected_ = false;
  bool takes_ = false;  // parts of tables are made by `as_strided` and `take`
  Functions torch_{};
  int32_t strided_, cpu_, cuda_, dtypes_[4];  // codes of PyTorch's; the dtypes as DType has them
  Python python_;
  Py_ssize_t handle_at_ = 0;  // of the at::Tensor in a Python tensor, in bytes
};

inline LibTorch libtorch;

void define_libtorch(py::module_& m);

}  // namespace tk
