// What a kernel needs to know of a torch.Tensor; libtorch.h reads it.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace tk {

constexpr int kMostDims = 5;  // of a tensor that a kernel reads

// The dimensions of a tensor. They are its own, and change when it is resized.
struct Dims {
  int count;
  const int64_t* size;
  const int64_t* stride;

  int64_t elements() const {
    int64_t product = 1;
    for (int d = 0; d < count; ++d) product *= size[d];
    return product;
  }

  // Whether the elements lie in memory without gaps, this dimension innermost and the others in
  // their order, as those of channels_last tensors do around dimension 1.
  bool dense(int inner) const {
    int64_t step = 1;
    const auto follows = [&](int d) {
      const bool fits = size[d] == 1 || stride[d] == step;
      step *= size[d];
      return fits;
    };
    if (!follows(inner)) return false;
    for (int d = count - 1; d >= 0; --d) {
      if (d != inner && !follows(d)) return false;
    }
    return true;
  }

  bool contiguous() const { return dense(count - 1); }

  bool same_sizes(const Dims& other) const {
    bool same = count == other.count;
    for (int d = 0; same && d < count; ++d) same = size[d] == other.size[d];
    return same;
  }

  bool same_strides(const Dims& other) const {
    bool same = count == other.count;
    for (int d = 0; same && d < count; ++d) same = stride[d] == other.stride[d];
    return same;
  }
};

struct TensorView {
  void* data;
  bool on_gpu;
  int32_t device_index;  // of the GPU
  DType dtype;
  Dims dims;

  bool on_device_of(const TensorView& other) const {
    return on_gpu == other.on_gpu && device_index == other.device_index;
  }
  bool like(const TensorView& other) const {
    return dtype == other.dtype && on_device_of(other) && dims.same_sizes(other.dims);
  }
};

}  // namespace tk
