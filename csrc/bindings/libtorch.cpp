#include "bindings/libtorch.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "bindings/records.h"

namespace tk {

py::tuple tuple_of(const int64_t* numbers, int count) {
  py::tuple found(count);
  for (int i = 0; i < count; ++i) found[i] = py::int_(numbers[i]);
  return found;
}

namespace {

// Strides of a tensor without gaps, the last dimension innermost.
std::array<int64_t, kMostDims> contiguous_strides(int count, const int64_t* sizes) {
  std::array<int64_t, kMostDims> strides{};
  int64_t step = 1;
  for (int d = count - 1; d >= 0; step *= sizes[d--]) strides[d] = step;
  return strides;
}

bool same(const py::object& value, const py::object& expected) { return value.equal(expected); }

}  // namespace

bool LibTorch::find(const std::string& module) {
  void* const library = dlopen(module.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return false;
  bool found = true;
  const auto set = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
    found = found && function;
  };
  const auto set_code = [&](int32_t& code, const char* name) {
    int32_t (*function)();
    set(function, name);
    if (function) code = function();
  };
  set(torch_.layout, "aoti_torch_get_layout");
  set(torch_.device_type, "aoti_torch_get_device_type");
  set(torch_.device_index, "aoti_torch_get_device_index");
  set(torch_.dtype, "aoti_torch_get_dtype");
  set(torch_.dim, "aoti_torch_get_dim");
  set(torch_.sizes, "aoti_torch_get_sizes");
  set(torch_.strides, "aoti_torch_get_strides");
  set(torch_.data, "aoti_torch_get_data_ptr");
  set(torch_.empty_strided, "aoti_torch_empty_strided");
  set(torch_.alias, "aoti_torch__reinterpret_tensor");
  set(torch_.destroy, "aoti_torch_delete_tensor_object");
  set(torch_.is_neg, "_ZN2at6native6is_negERKNS_6TensorE");     // at::native::is_neg
  set(torch_.wrap, "_Z16THPVariable_WrapRKN2at10TensorBaseE");  // THPVariable_Wrap
  set_code(strided_, "aoti_torch_layout_strided");
  set_code(cpu_, "aoti_torch_device_type_cpu");
  set_code(cuda_, "aoti_torch_device_type_cuda");
  set_code(dtypes_[static_cast<int>(DType::f32)], "aoti_torch_dtype_float32");
  set_code(dtypes_[static_cast<int>(DType::f16)], "aoti_torch_dtype_float16");
  set_code(dtypes_[static_cast<int>(DType::bf16)], "aoti_torch_dtype_bfloat16");
  set_code(dtypes_[static_cast<int>(DType::f64)], "aoti_torch_dtype_float64");
  const bool enough = found;
  set(torch_.as_strided,  // at::native::as_strided_tensorimpl
      "_ZN2at6native21as_strided_tensorimplERKNS_6TensorEN3c108ArrayRefIlEES6_St8optionalIlE");
  set(torch_.take, "_Z16THPVariable_WrapON2at10TensorBaseE");  // THPVariable_Wrap of a temporary
  takes_ = found;
  dlclose(library);  // as it was found: torch._C stays loaded
  return enough;
}

// An at::Tensor is one word, the address of the TensorImpl that Tensor._cdata is told as a number.
// It lies at the same place in every Python tensor, which is no larger than its class says.
bool LibTorch::find_handles(const py::list& samples) {
  handle_at_ = 0;
  for (const py::handle sample : samples) {
    const auto address = sample.attr("_cdata").cast<uintptr_t>();
    const auto size = static_cast<Py_ssize_t>(Py_TYPE(sample.ptr())->tp_basicsize);
    Py_ssize_t at = sizeof(PyObject);
    for (uintptr_t word = 0; at + Py_ssize_t(sizeof(word)) <= size; at += sizeof(word)) {
      std::memcpy(&word, reinterpret_cast<char*>(sample.ptr()) + at, sizeof(word));
      if (word == address) break;
    }
    if (at >= size || (handle_at_ && at != handle_at_)) return false;
    handle_at_ = at;
  }
  return handle_at_ > 0;
}

bool LibTorch::sees(py::handle sample) const {
  const auto found = view(sample);
  if (!found) return false;
  const Dims& dims = found->dims;
  return found->data == data_of(sample) && !found->on_gpu &&
         py::object(sample.attr("dtype")).is(torch_dtypes[static_cast<size_t>(found->dtype)]) &&
         same(sample.attr("shape"), tuple_of(dims.size, dims.count)) &&
         same(sample.attr("stride")(), tuple_of(dims.stride, dims.count));
}

// A PyTorch that lacks what is asked of it here is one more that calls do without.
bool LibTorch::makes() const try {
  const int64_t sizes[] = {3, 2};
  const Made made = empty(2, sizes, DType::f64);
  const auto seen = view(made.tensor);
  return seen && seen->data == made.data && sees(made.tensor) &&
         same(made.tensor.attr("shape"), tuple_of(sizes, 2)) && splits(made);
} catch (const std::exception&) {
  return false;
}

// Whether the parts of a table of three rows are what they should be, and nothing but Python holds
// them.
bool LibTorch::splits(const Made& table) const {
  const py::list parts = split(table.tensor, view(table.tensor)->dims, {2, 1});
  const py::object last = parts[1];
  return sees(last) && same(last.attr("shape"), py::make_tuple(1, 2)) &&
         data_of(last) == static_cast<double*>(table.data) + 4 &&
         same(last.attr("_use_count")(), table.tensor.attr("_use_count")());
}

bool LibTorch::connect(const std::string& module, const Python& python, const py::list& samples,
                       const py::list& negated) {
  python_ = python;
  connected_ = false;
  if (!find(module) || !find_handles(samples)) return false;
  connected_ = true;
  for (const py::handle sample : samples) connected_ = connected_ && sees(sample);
  for (const py::handle sample : negated) connected_ = connected_ && !view(sample);
  // Both ways to split are tried, and the slower one is there for where the other gives less.
  const bool takes = std::exchange(takes_, false);
  connected_ = connected_ && makes();
  takes_ = connected_ && takes;
  takes_ = takes_ && makes();
  return connected_;
}

bool LibTorch::read(PyObject* object, TensorView& found) const {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (!connected_ || (type != python_.tensor.ptr() && type != python_.parameter.ptr()))
    return false;
  const Handle tensor = handle_of(object);
  // In this order: what has no dense values on such a device is not asked where they lie. Whether
  // the values are those in memory with the sign turned (x.conj().imag) nothing else tells.
  int32_t layout, device_type, dtype;
  if (torch_.layout(tensor, &layout) || layout != strided_ ||
      torch_.device_type(tensor, &device_type) || (device_type != cpu_ && device_type != cuda_) ||
      torch_.dtype(tensor, &dtype) || torch_.is_neg(tensor)) {
    return false;
  }
  found.on_gpu = device_type == cuda_;
  found.device_index = 0;
  if (found.on_gpu && torch_.device_index(tensor, &found.device_index)) return false;
  int known = 0;
  while (known < 4 && dtypes_[known] != dtype) ++known;
  int64_t count;
  Dims& dims = found.dims;
  if (known == 4 || torch_.dim(tensor, &count) || count < 1 || count > kMostDims ||
      torch_.sizes(tensor, &dims.size) || torch_.strides(tensor, &dims.stride) ||
      torch_.data(tensor, &found.data) || !found.data) {
    return false;
  }
  dims.count = static_cast<int>(count);
  found.dtype = static_cast<DType>(known);
  return dims.elements() > 0;
}

py::object LibTorch::to_python(Handle made) const {
  PyObject* const wrapped = torch_.wrap(made);
  torch_.destroy(made);  // the Python tensor has a reference of its own
  if (!wrapped) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(wrapped);
}

Made LibTorch::empty(int count, const int64_t* sizes, DType dtype) const {
  Handle made;
  const auto known = static_cast<size_t>(dtype);
  if (!python_.fills_memory().cast<bool>() &&
      torch_.empty_strided(count, sizes, contiguous_strides(count, sizes).data(), dtypes_[known],
                           cpu_, 0, &made) == 0) {
    void* data = nullptr;
    torch_.data(made, &data);
    return {to_python(made), data};
  }
  // It fills, or says what is wrong.
  py::object filled = python_.empty(tuple_of(sizes, count), py::arg("dtype") = torch_dtypes[known],
                                    py::arg("device") = "cpu");
  void* const data = data_of(filled);
  return {std::move(filled), data};
}

py::object LibTorch::part(Handle table, Sizes sizes, Sizes strides, int64_t offset) const {
  if (takes_) {
    Returned made = torch_.as_strided(table, sizes, strides, offset);
    PyObject* const taken = torch_.take(&made);
    if (!taken) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(taken);
  }
  Handle made;
  if (torch_.alias(table, static_cast<int64_t>(sizes.count), sizes.first, strides.first, offset,
                   &made) != 0) {
    throw std::runtime_error("PyTorch could not make a view of a table");
  }
  return to_python(made);
}

py::list LibTorch::split(py::handle table, const Dims& dims,
                         const std::vector<int64_t>& rows) const {
  py::list parts(rows.size());
  const auto count = static_cast<size_t>(dims.count);
  int64_t sizes[kMostDims];
  std::copy_n(dims.size, count, sizes);
  int64_t offset = 0;
  Py_ssize_t place = 0;
  for (const int64_t of_part : rows) {
    sizes[0] = of_part;
    PyList_SET_ITEM(
        parts.ptr(), place++,
        part(handle_of(table.ptr()), {sizes, count}, {dims.stride, count}, offset).release().ptr());
    offset += of_part * dims.stride[0];
  }
  return parts;
}

void define_libtorch(py::module_& m) {
  m.def("connect_libtorch",
        [](const std::string& module, py::object tensor, py::object parameter, py::object empty,
           py::object fills_memory, const py::list& samples, const py::list& negated) {
          // Classes and functions of torch, held as long as this module is.
          const LibTorch::Python python{tensor.release(), parameter.release(), empty.release(),
                                        fills_memory.release()};
          return libtorch.connect(module, python, samples, negated);
        });
}

}  // namespace tk
