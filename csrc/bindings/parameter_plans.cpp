#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "bindings/plans.h"
#include "common/ops.h"

namespace tk {

std::optional<int64_t> integer(PyObject* value, int64_t least) {
  if (!PyLong_CheckExact(value)) return {};
  int overflow = 0;
  const int64_t number = PyLong_AsLongLongAndOverflow(value, &overflow);
  if (overflow || number < least || number > UINT32_MAX / 2) return {};
  return number;
}

namespace {

// A list of one's own, since another thread may change the caller's while kernels run.
py::object own(py::handle value) {
  const bool listed = PyList_Check(value.ptr()) || PyTuple_Check(value.ptr());
  if (!listed) return py::reinterpret_borrow<py::object>(value);
  const auto list = py::reinterpret_steal<py::object>(PySequence_List(value.ptr()));
  if (!list) throw py::error_already_set();
  return list;
}

// The i-th of a list, or the one value for all of it.
PyObject* at(py::handle values, Py_ssize_t i) {
  return PyList_Check(values.ptr()) ? PyList_GET_ITEM(values.ptr(), i) : values.ptr();
}

int64_t columns_of(const ParameterItem& item) { return item.groups * item.channels; }

// The parts of the packed tables, [rows or columns, sums], that each parameter's sums go to.
void set_tables(ParameterList& call, void* row_table, void* col_table, int64_t bytes_per_filter) {
  auto* row_out = static_cast<char*>(row_table);
  auto* col_out = static_cast<char*>(col_table);
  for (auto& item : call.items) {
    item.row_out = row_out;
    item.col_out = col_out;
    if (row_out) row_out += item.rows * bytes_per_filter;
    if (col_out) col_out += columns_of(item) * bytes_per_filter;
  }
}

// A table's parts along an axis, 0 by rows and 1 by columns: one for each parameter.
py::list split(const ParameterList& call, py::object table, int axis) {
  if (call.items.size() > 1) {
    if (const auto whole = libtorch.view(table)) {
      std::vector<int64_t> rows;
      rows.reserve(call.items.size());
      for (const auto& item : call.items) rows.push_back(axis ? columns_of(item) : item.rows);
      return libtorch.split(table, whole->dims, rows);
    }
  }
  py::list parts(1);
  parts[0] = std::move(table);
  return parts;
}

// An int for all of a list, or a list of one for each.
class Ints {
  py::object values_;
  int64_t least_, one_ = -1;  // -1: not an int that fits

 public:
  Ints(py::handle values, int64_t least) : values_(own(values)), least_(least) {
    if (!listed()) one_ = integer(values_.ptr(), least).value_or(-1);
  }
  bool listed() const { return PyList_Check(values_.ptr()); }
  bool fits(Py_ssize_t count) const {
    return listed() ? PyList_GET_SIZE(values_.ptr()) == count : true;
  }
  // Of the i-th, or -1. No optional: to copy one takes as long as to read a tensor.
  int64_t of(Py_ssize_t i) const {
    return listed() ? integer(PyList_GET_ITEM(values_.ptr(), i), least_).value_or(-1) : one_;
  }
};

// A tensor that belongs to a weight and lies in memory as it does: its address.
bool beside(py::handle values, Py_ssize_t i, const TensorView& weight, bool channels_last,
            const void** address) {
  if (values.is_none()) return true;
  TensorView found;
  if (!libtorch.read(at(values, i), found) || !found.like(weight)) return false;
  if (!found.dims.same_strides(weight.dims) &&
      !(channels_last ? found.dims.dense(1) : found.dims.contiguous())) {
    return false;
  }
  *address = found.data;
  return true;
}

bool read_weight(const TensorView& weight, int64_t groups, bool cols, ParameterItem& item) {
  const Dims& dims = weight.dims;
  // Most have one group, and a division takes as long as reading a tensor.
  if ((groups != 1 && dims.size[0] % groups) || (cols && dims.count < 2)) return false;
  const bool contiguous = dims.contiguous();
  if (!contiguous && !(dims.count > 1 && dims.dense(1))) return false;
  item.weight = weight.data;
  item.rows = dims.size[0];
  item.channels = dims.count > 1 ? dims.size[1] : 1;
  item.kernel = 1;
  for (int d = 2; d < dims.count; ++d) item.kernel *= dims.size[d];
  item.groups = groups;
  item.dtype = weight.dtype;
  item.channels_last = !contiguous;
  return true;
}

bool same_table(const TensorView& weight, const TensorView& first) {
  return weight.on_device_of(first) && (weight.dtype == DType::f64) == (first.dtype == DType::f64);
}

// What a call over parameters is made of: tensors or lists of them, the weights and what belongs to
// them or None; groups and streams, an int or a list of one for each, streams None for the place in
// the list; whether columns are wanted.
struct Given {
  py::object weights, grads, hvps;
  Ints groups, streams;
  bool by_place;  // streams are
  bool cols;

  bool fits() const {
    const bool listed = PyList_Check(weights.ptr());
    for (const py::handle values : {grads, hvps}) {
      if (values.is_none()) continue;
      if (PyList_Check(values.ptr()) != listed) return false;
      if (listed && PyList_GET_SIZE(values.ptr()) != count()) return false;
    }
    return groups.fits(count()) && streams.fits(count()) && count() > 0;
  }

  Py_ssize_t count() const {
    return PyList_Check(weights.ptr()) ? PyList_GET_SIZE(weights.ptr()) : 1;
  }

  // Reads the parameter at place i, whose sums go to one table with those of the first.
  bool read(Py_ssize_t i, TensorView& first, ParameterItem& item) const {
    TensorView weight;
    const int64_t of_groups = groups.of(i), stream = by_place ? i : streams.of(i);
    if (of_groups < 0 || stream < 0 || !libtorch.read(at(weights, i), weight)) return false;
    if (i == 0) first = weight;
    item.stream = static_cast<uint32_t>(stream);
    return same_table(weight, first) && read_weight(weight, of_groups, cols, item) &&
           beside(grads, i, weight, item.channels_last, &item.grad) &&
           beside(hvps, i, weight, item.channels_last, &item.hvp);
  }
};

// Of a call with fewer elements Python's lock is not given up: to take it again costs as much as
// the kernels do.
constexpr int64_t kFewElements = 1 << 14;

// The call of an op whose tables have `sums` columns, 0 for tables of one dimension. `chosen` are
// the sums that are wanted, a bit each. It gives the table of each axis, in a list, and, unless it
// is to stay whole, the list of its parts, in another list; or a plan, which splits them, whose
// sizes are how many filters all parameters have by rows and by columns.
py::object call_parameters(void (*run)(const ParameterList&, int), py::handle weights,
                           py::handle grads, py::handle hvps, py::handle groups, py::handle streams,
                           bool rows, bool cols, int64_t sums, py::int_ seed, uint32_t chosen,
                           int threads, bool whole) {
  const Given given{own(weights),     own(grads),        own(hvps), Ints(groups, 1),
                    Ints(streams, 0), streams.is_none(), cols};
  if (!given.fits()) return py::none();
  ParameterList call;
  call.items.resize(given.count());
  int64_t filters[] = {0, 0}, elements = 0;
  TensorView first{};
  for (Py_ssize_t i = 0; i < given.count(); ++i) {
    ParameterItem& item = call.items[i];
    if (!given.read(i, first, item)) return py::none();
    filters[0] += item.rows;
    filters[1] += columns_of(item);
    elements += item.rows * item.channels * item.kernel;
  }
  if (first.on_gpu || threads == 0) {
    py::tuple held = py::make_tuple(given.weights, given.grads, given.hvps);
    return handed_over(Plan<ParameterList>{std::move(call), std::move(held)}, first,
                       py::make_tuple(filters[0], filters[1]));
  }
  py::list found(rows + cols);
  void* tables[] = {nullptr, nullptr};
  for (const int axis : {0, 1}) {
    if (!(axis ? cols : rows)) continue;
    const int64_t sizes[] = {filters[axis], sums};
    Made table = libtorch.empty(sums ? 2 : 1, sizes, sums_of(first));
    tables[axis] = table.data;
    found[axis && rows] = std::move(table.tensor);
  }
  const int64_t bytes = std::max<int64_t>(sums, 1) * size_of(sums_of(first));
  set_tables(call, tables[0], tables[1], bytes);
  call.seed = PyLong_AsUnsignedLongLongMask(seed.ptr());  // as a number of 64 bits
  call.sums = chosen;
  {
    std::optional<py::gil_scoped_release> no_gil;
    if (elements >= kFewElements) no_gil.emplace();
    run(call, threads);
  }
  if (whole) return py::make_tuple(std::move(found), py::none());
  py::list parts(found.size());
  for (size_t i = 0; i < found.size(); ++i) parts[i] = split(call, found[i], i || !rows);
  return py::make_tuple(std::move(found), std::move(parts));
}

}  // namespace

void define_parameter_plans(py::module_& m) {
  py::class_<Plan<ParameterList>>(m, "ParameterPlan")
      .def("set_tables",
           [](Plan<ParameterList>& plan, py::handle rows, py::handle cols, int64_t bytes) {
             const auto data = [](py::handle t) { return t.is_none() ? nullptr : data_of(t); };
             set_tables(plan.call, data(rows), data(cols), bytes);
           })
      .def("split", [](const Plan<ParameterList>& plan, py::object table, int axis) {
        return split(plan.call, std::move(table), axis);
      });
  const auto define = [&](const char* name, void (*run)(const ParameterList&, int)) {
    m.def(name, [run](py::handle weights, py::handle grads, py::handle hvps, py::handle groups,
                      py::handle streams, bool rows, bool cols, int64_t sums, py::int_ seed,
                      uint32_t chosen, int threads, bool whole) {
      return call_parameters(run, weights, grads, hvps, groups, streams, rows, cols, sums, seed,
                             chosen, threads, whole);
    });
  };
  define("call_filter_moments", &filter_moments_cpu);
  define("call_second_order_moments", &second_order_moments_cpu);
  define("call_hutchinson_moments", &hutchinson_moments_cpu);
}

}  // namespace tk
