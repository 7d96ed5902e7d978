#include <algorithm>
#include <cstdint>
#include <optional>

#include "bindings/plans.h"
#include "common/ops.h"

namespace tk {
namespace {

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

// Tensors, a bias or None, and the channels' dimension.
py::object call_gate_gradients(py::handle output, py::handle grad_output, py::handle bias,
                               py::handle channel_dim, int threads) {
  const auto y = libtorch.view(output);
  const auto dy = libtorch.view(grad_output);
  const auto given = integer(channel_dim.ptr(), -kMostDims);
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
    if (!dims.dense(last) || !dy->dims.dense(last)) {
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
    const auto b = libtorch.view(bias);
    if (!b || b->dtype != y->dtype || !b->on_device_of(*y) || b->dims.count != 1 ||
        b->dims.size[0] != call.channels || !b->dims.contiguous()) {
      return py::none();
    }
    call.bias = b->data;
  }
  const int64_t sizes[] = {call.batch, call.channels};
  return call_one(&gate_gradients_cpu, call, *y, 2, sizes, threads);
}

// What is left of a call of conv2d_fisher once the sizes are known.
py::object finish_fisher(Conv2dFisherArgs& call, const TensorView& x, const TensorView& dy,
                         py::handle weight, const Dims& weight_dims, int threads) {
  if (x.dtype != dy.dtype || !x.on_device_of(dy)) return py::none();
  const bool x_dense = x.dims.contiguous(), dy_dense = dy.dims.contiguous();
  if ((!x_dense && !x.dims.dense(1)) || (!dy_dense && !dy.dims.dense(1))) {
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
    const auto w = libtorch.view(weight);
    if (!w || !w->dims.same_sizes(weight_dims) || !w->dims.contiguous() || !w->on_device_of(x) ||
        (w->dtype != x.dtype && w->dtype != DType::f32)) {
      return py::none();
    }
    call.weight = w->data;
    call.weight_dtype = w->dtype;
  }
  const int dimensions = call.weight ? 1 : weight_dims.count;
  return call_one(&conv2d_fisher_cpu, call, x, dimensions, weight_dims.size, threads);
}

py::object call_conv2d_fisher(py::handle input, py::handle weight_size, py::handle grad_output,
                              py::handle stride, py::handle padding, py::handle dilation,
                              py::handle groups, py::handle weight, int threads) {
  const auto x = libtorch.view(input);
  const auto dy = libtorch.view(grad_output);
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
  return finish_fisher(call, *x, *dy, weight, {4, size, nullptr}, threads);
}

// [N, *, features] as [N, features, tokens, 1]: an image of one column, features innermost.
struct Image {
  int64_t size[4], stride[4];

  explicit Image(const Dims& dims) {
    const int64_t features = dims.size[dims.count - 1];
    const int64_t tokens = dims.elements() / (dims.size[0] * features);
    const int64_t sizes[] = {dims.size[0], features, tokens, 1};
    const int64_t strides[] = {tokens * features, 1, features, 1};
    std::copy_n(sizes, 4, size);
    std::copy_n(strides, 4, stride);
  }

  TensorView of(TensorView tensor) const {
    tensor.dims = {4, size, stride};
    return tensor;
  }
};

py::object call_linear_fisher(py::handle input, py::handle grad_output, py::handle weight,
                              int threads) {
  const auto flat_x = libtorch.view(input);
  const auto flat_dy = libtorch.view(grad_output);
  if (!flat_x || !flat_dy || flat_x->dims.count < 2 || flat_x->dims.count != flat_dy->dims.count ||
      !flat_x->dims.contiguous() || !flat_dy->dims.contiguous()) {
    return py::none();
  }
  for (int d = 0; d + 1 < flat_x->dims.count; ++d) {
    if (flat_x->dims.size[d] != flat_dy->dims.size[d]) return py::none();
  }
  const Image x_image(flat_x->dims), dy_image(flat_dy->dims);
  const TensorView x = x_image.of(*flat_x), dy = dy_image.of(*flat_dy);
  Conv2dFisherArgs call{};
  call.groups = 1;
  call.filters = dy.dims.size[1];
  call.channels = x.dims.size[1];
  call.kernel = call.stride = call.dilation = {1, 1};
  const int64_t size[] = {call.filters, call.channels};
  return finish_fisher(call, x, dy, weight, {2, size, nullptr}, threads);
}

// The plan of an op with one output, for Python.
template <class Call>
py::class_<Plan<Call>> define_plan(py::module_& m, const char* name) {
  return py::class_<Plan<Call>>(m, name).def(
      "set_out", [](Plan<Call>& plan, py::handle out) { plan.call.out = data_of(out); });
}

}  // namespace

void define_activation_plans(py::module_& m) {
  define_plan<GateGradientsArgs>(m, "GateGradientsPlan");
  define_plan<Conv2dFisherArgs>(m, "Conv2dFisherPlan")
      .def("set_tf32", [](Plan<Conv2dFisherArgs>& plan, bool tf32) { plan.call.tf32 = tf32; });
  m.def("call_gate_gradients", &call_gate_gradients);
  m.def("call_conv2d_fisher", &call_conv2d_fisher);
  m.def("call_linear_fisher", &call_linear_fisher);
}

}  // namespace tk
