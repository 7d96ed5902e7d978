#include "bindings/plans.h"

#include <optional>
#include <utility>

#include "bindings/tensor_view.h"

namespace tk {
namespace {

// The address of an output that Python made for a plan.
void* out_of(py::handle tensor) { return tensor.is_none() ? nullptr : data_of(tensor); }

// What Python needs to know to make the outputs: where, and whether in float64.
py::tuple placed(py::object plan, const TensorView& like, py::object sizes) {
  return py::make_tuple(std::move(plan), like.device.type == dlpack::kCuda, like.device.index,
                        like.dtype == DType::f64, std::move(sizes));
}

// An int that is no bool, from `least` on; products of two fit into 64 bits.
std::optional<int64_t> integer(PyObject* value, int64_t least) {
  if (!PyLong_CheckExact(value)) return {};
  int overflow = 0;
  const int64_t number = PyLong_AsLongLongAndOverflow(value, &overflow);
  if (overflow || number < least || number > UINT32_MAX / 2) return {};
  return number;
}

// `count` of them, from a list or a tuple.
bool integers(PyObject* values, int64_t least, int count, int64_t* found) {
  if (!PyTuple_Check(values) && !PyList_Check(values)) return false;
  if (PySequence_Fast_GET_SIZE(values) != count) return false;
  for (int i = 0; i < count; ++i) {
    const auto number = integer(PySequence_Fast_GET_ITEM(values, i), least);
    if (!number) return false;
    found[i] = *number;
  }
  return true;
}

// One for both axes, or a pair.
std::optional<Extent2d> extent(py::handle value, int64_t least) {
  if (const auto both = integer(value.ptr(), least)) return Extent2d{*both, *both};
  int64_t pair[2];
  if (!integers(value.ptr(), least, 2, pair)) return {};
  return Extent2d{pair[0], pair[1]};
}

// The i-th of a list, or the one value for all of it.
PyObject* at(py::handle values, Py_ssize_t i) {
  return PyList_Check(values.ptr()) ? PyList_GET_ITEM(values.ptr(), i) : values.ptr();
}

int64_t columns_of(const ParameterItem& item) { return item.groups * item.channels; }

// The parts of the packed tables, [rows or columns, sums], that each parameter's sums go to.
void set_tables(Plan<ParameterList>& plan, py::handle row_table, py::handle col_table,
                int64_t bytes_per_filter) {
  auto* row_out = static_cast<char*>(out_of(row_table));
  auto* col_out = static_cast<char*>(out_of(col_table));
  for (auto& item : plan.call.items) {
    item.row_out = row_out;
    item.col_out = col_out;
    if (row_out) row_out += item.rows * bytes_per_filter;
    if (col_out) col_out += columns_of(item) * bytes_per_filter;
  }
}

// How many filters each parameter has along an axis: 0 by rows, 1 by columns.
py::list filters(const Plan<ParameterList>& plan, int axis) {
  const auto& items = plan.call.items;
  py::list found(items.size());
  for (size_t i = 0; i < items.size(); ++i) {
    found[i] = py::int_(axis ? columns_of(items[i]) : items[i].rows);
  }
  return found;
}

// A tensor that belongs to a weight and lies in memory as it does: its address.
bool beside(py::handle values, Py_ssize_t i, const TensorView& weight, bool channels_last,
            const void** address) {
  if (values.is_none()) return true;
  const auto found = exchange.view(at(values, i));
  if (!found || !found->like(weight)) return false;
  if (!(channels_last ? found->dims.with_last(1) : found->dims).contiguous()) return false;
  *address = found->data;
  return true;
}

std::optional<ParameterItem> parameter(const TensorView& weight, int64_t groups, bool cols) {
  const Dims& dims = weight.dims;
  if (dims.size[0] % groups || (cols && dims.count < 2)) return {};
  const bool contiguous = dims.contiguous();
  if (!contiguous && !(dims.count > 1 && dims.with_last(1).contiguous())) return {};
  ParameterItem item{};
  item.weight = weight.data;
  item.rows = dims.size[0];
  item.channels = dims.count > 1 ? dims.size[1] : 1;
  item.kernel = dims.elements() / (item.rows * item.channels);
  item.groups = groups;
  item.dtype = weight.dtype;
  item.channels_last = !contiguous;
  return item;
}

bool same_table(const TensorView& weight, const TensorView& first) {
  return weight.on_device_of(first) && (weight.dtype == DType::f64) == (first.dtype == DType::f64);
}

// Tensors or lists of them: weights, and what belongs to them or None. groups and streams: an int,
// or a list of one for each; streams None: the place in the list. The sizes are how many filters
// all of them have together, by rows and by columns.
py::object plan_parameters(py::handle weights, py::handle grads, py::handle hvps, py::handle groups,
                           py::handle streams, bool cols) {
  const bool listed = PyList_Check(weights.ptr());
  const Py_ssize_t count = listed ? PyList_GET_SIZE(weights.ptr()) : 1;
  for (const py::handle values : {grads, hvps, groups, streams}) {
    if (PyList_Check(values.ptr()) && PyList_GET_SIZE(values.ptr()) != count) return py::none();
  }
  for (const py::handle values : {grads, hvps}) {
    if (!values.is_none() && PyList_Check(values.ptr()) != listed) return py::none();
  }
  Plan<ParameterList> plan;
  plan.call.items.reserve(count);
  int64_t row_count = 0, col_count = 0;
  std::optional<TensorView> first;
  for (Py_ssize_t i = 0; i < count; ++i) {
    const auto weight = exchange.view(at(weights, i));
    const auto of_groups = integer(at(groups, i), 1);
    if (!weight || !of_groups) return py::none();
    if (!first) first = weight;
    auto item = parameter(*weight, *of_groups, cols);
    if (!item || !same_table(*weight, *first) ||
        !beside(grads, i, *weight, item->channels_last, &item->grad) ||
        !beside(hvps, i, *weight, item->channels_last, &item->hvp)) {
      return py::none();
    }
    const auto stream = streams.is_none() ? std::optional<int64_t>(i) : integer(at(streams, i), 0);
    if (!stream) return py::none();
    item->stream = static_cast<uint32_t>(*stream);
    row_count += item->rows;
    col_count += columns_of(*item);
    plan.call.items.push_back(*item);
  }
  if (!first) return py::none();
  py::object sizes = py::make_tuple(row_count, col_count);
  return placed(py::cast(std::move(plan)), *first, std::move(sizes));
}

template <class Call>
void set_out(Plan<Call>& plan, py::handle out) {
  plan.call.out = out_of(out);
}

// Tensors, a bias or None, and the channels' dimension.
py::object plan_gate_gradients(py::handle output, py::handle grad_output, py::handle bias,
                               py::handle channel_dim) {
  const auto y = exchange.view(output);
  const auto dy = exchange.view(grad_output);
  const auto given = integer(channel_dim.ptr(), -Dims::kMost);
  if (!y || !dy || !dy->like(*y) || !given) return py::none();
  const Dims& dims = y->dims;
  const int64_t channel = *given < 0 ? *given + dims.count : *given;
  if (channel < 1 || channel >= dims.count) return py::none();
  GateGradientsArgs call{};
  call.batch = dims.size[0];
  call.channels = dims.size[channel];
  call.outer = call.inner = 1;
  for (int d = 1; d < dims.count; ++d) {
    if (d != channel) (d < channel ? call.outer : call.inner) *= dims.size[d];
  }
  if (!dims.contiguous()) {
    const int last = static_cast<int>(channel);
    if (!dims.with_last(last).contiguous() || !dy->dims.with_last(last).contiguous()) {
      return py::none();
    }
    call.outer *= call.inner;
    call.inner = 1;
  } else if (!dy->dims.contiguous()) {
    return py::none();
  }
  call.output = y->data;
  call.grad_output = dy->data;
  call.dtype = y->dtype;
  if (!bias.is_none()) {
    const auto b = exchange.view(bias);
    if (!b || b->dtype != y->dtype || !b->on_device_of(*y) || b->dims.count != 1 ||
        b->dims.size[0] != call.channels || !b->dims.contiguous()) {
      return py::none();
    }
    call.bias = b->data;
  }
  py::object sizes = py::make_tuple(call.batch, call.channels);
  return placed(py::cast(Plan<GateGradientsArgs>{call}), *y, std::move(sizes));
}

// What is left of a call of conv2d_fisher once the sizes are known.
py::object finish_fisher(Conv2dFisherArgs& call, const TensorView& x, const TensorView& dy,
                         py::handle weight, const Dims& weight_dims, py::object size) {
  if (x.dtype != dy.dtype || !x.on_device_of(dy)) return py::none();
  const bool x_dense = x.dims.contiguous(), dy_dense = dy.dims.contiguous();
  if ((!x_dense && !x.dims.with_last(1).contiguous()) ||
      (!dy_dense && !dy.dims.with_last(1).contiguous())) {
    return py::none();
  }
  call.input = x.data;
  call.grad_output = dy.data;
  call.batch = x.dims.size[0];
  call.image = {x.dims.size[2], x.dims.size[3]};
  call.out_image = {dy.dims.size[2], dy.dims.size[3]};
  call.input_channels_last = !x_dense;
  call.grad_channels_last = !dy_dense;
  call.dtype = call.weight_dtype = x.dtype;
  if (!weight.is_none()) {
    const auto w = exchange.view(weight);
    if (!w || !w->dims.same_sizes(weight_dims) || !w->dims.contiguous() || !w->on_device_of(x) ||
        (w->dtype != x.dtype && w->dtype != DType::f32)) {
      return py::none();
    }
    call.weight = w->data;
    call.weight_dtype = w->dtype;
    size = py::make_tuple(weight_dims.size[0]);
  }
  return placed(py::cast(Plan<Conv2dFisherArgs>{call}), x, std::move(size));
}

py::object plan_conv2d_fisher(py::handle input, py::handle weight_size, py::handle grad_output,
                              py::handle stride, py::handle padding, py::handle dilation,
                              py::handle groups, py::handle weight) {
  const auto x = exchange.view(input);
  const auto dy = exchange.view(grad_output);
  int64_t size[4];
  const auto steps = extent(stride, 1), pads = extent(padding, 0), gaps = extent(dilation, 1);
  const auto parts = integer(groups.ptr(), 1);
  if (!x || !dy || x->dims.count != 4 || dy->dims.count != 4 || !steps || !pads || !gaps ||
      !parts || !integers(weight_size.ptr(), 1, 4, size)) {
    return py::none();
  }
  Conv2dFisherArgs call{};
  call.groups = *parts;
  call.filters = size[0] / *parts;
  call.channels = size[1];
  call.kernel = {size[2], size[3]};
  call.stride = *steps;
  call.padding = *pads;
  call.dilation = *gaps;
  const auto reach = [](int64_t image, int64_t kernel, int64_t step, int64_t pad, int64_t gap) {
    const int64_t room = image + 2 * pad - gap * (kernel - 1) - 1;
    return room < 0 ? 0 : room / step + 1;
  };
  const int64_t* image = x->dims.size + 2;
  const int64_t fitting[4] = {x->dims.size[0], size[0],
                              reach(image[0], size[2], steps->h, pads->h, gaps->h),
                              reach(image[1], size[3], steps->w, pads->w, gaps->w)};
  if (size[0] % *parts || x->dims.size[1] != size[1] * *parts) return py::none();
  for (int d = 0; d < 4; ++d) {
    if (dy->dims.size[d] != fitting[d]) return py::none();
  }
  Dims weight_dims;
  for (const int64_t extent : size) weight_dims.add(extent, 0);
  return finish_fisher(call, *x, *dy, weight, weight_dims,
                       py::make_tuple(size[0], size[1], size[2], size[3]));
}

// [N, *, features] as [N, features, tokens, 1]: an image of one column, features innermost.
std::optional<TensorView> as_image(const std::optional<TensorView>& tensor) {
  if (!tensor || tensor->dims.count < 2 || !tensor->dims.contiguous()) return {};
  const Dims& dims = tensor->dims;
  const int64_t features = dims.size[dims.count - 1];
  const int64_t tokens = dims.elements() / (dims.size[0] * features);
  TensorView image = *tensor;
  image.dims = {};
  image.dims.add(dims.size[0], tokens * features);
  image.dims.add(features, 1);
  image.dims.add(tokens, features);
  image.dims.add(1, 1);
  return image;
}

py::object plan_linear_fisher(py::handle input, py::handle grad_output, py::handle weight) {
  const auto flat_x = exchange.view(input);
  const auto flat_dy = exchange.view(grad_output);
  const auto x = as_image(flat_x), dy = as_image(flat_dy);
  if (!x || !dy || flat_x->dims.count != flat_dy->dims.count) return py::none();
  for (int d = 0; d + 1 < flat_x->dims.count; ++d) {
    if (flat_x->dims.size[d] != flat_dy->dims.size[d]) return py::none();
  }
  Conv2dFisherArgs call{};
  call.groups = 1;
  call.filters = dy->dims.size[1];
  call.channels = x->dims.size[1];
  call.kernel = call.stride = call.dilation = {1, 1};
  Dims weight_dims;
  weight_dims.add(call.filters, 0);
  weight_dims.add(call.channels, 0);
  return finish_fisher(call, *x, *dy, weight, weight_dims,
                       py::make_tuple(call.filters, call.channels));
}

}  // namespace

void define_plans(py::module_& m) {
  m.def("set_exchange",
        [](const py::capsule& api, const py::type& tensor, const py::type& parameter) {
          return exchange.set(api, tensor, parameter);
        });
  py::class_<Plan<ParameterList>>(m, "ParameterPlan")
      .def("set_tables", &set_tables)
      .def("filters", &filters);
  py::class_<Plan<GateGradientsArgs>>(m, "GateGradientsPlan")
      .def("set_out", &set_out<GateGradientsArgs>);
  py::class_<Plan<Conv2dFisherArgs>>(m, "Conv2dFisherPlan")
      .def("set_out", &set_out<Conv2dFisherArgs>)
      .def("set_tf32", [](Plan<Conv2dFisherArgs>& plan, bool tf32) { plan.call.tf32 = tf32; });
  m.def("plan_parameters", &plan_parameters);
  m.def("plan_gate_gradients", &plan_gate_gradients);
  m.def("plan_conv2d_fisher", &plan_conv2d_fisher);
  m.def("plan_linear_fisher", &plan_linear_fisher);
}

}  // namespace tk
