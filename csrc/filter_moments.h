// filter_moments: per filter f, over its elements e of a weight w and its gradient g,
//   out[f] = ( Σ gw, Σ (gw)², Σ |gw|, Σ w², Σ g² )
// for output filters (rows), for input channels (cols), or for both from one read of w and g.
//
// A parameter is a dense block of rows × channels × kernel elements, stored in one of two orders:
//   contiguous     element (r, c, k) at (r·channels + c)·kernel + k
//   channels last  element (r, c, k) at (r·kernel + k)·channels + c
// Row r of `rows` belongs to group r / (rows / groups); the column of element (r, c, k) is
// group(r)·channels + c, so a grouped convolution's columns are its real input channels.
//
// Outputs: row_out [rows, 5] and col_out [groups·channels, 5], contiguous; either may be null.
// float32, or float64 where dtype is f64. Sums run in float32 at least, in an order that depends
// on the item's shape alone: same bits whatever the threads, the rest of the list or its split.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace tk {

constexpr int kMoments = 5;

struct FilterMomentsItem {
  const void* w;
  const void* g;
  int64_t rows;
  int64_t channels;
  int64_t kernel;
  int64_t groups;  // divides rows
  void* row_out;
  void* col_out;
  DType dtype;
  int32_t channels_last;
};

void filter_moments_cpu(const FilterMomentsItem* items, int64_t count, int threads);

// Bytes of device memory that filter_moments_cuda needs beside inputs and outputs; 0 is possible.
int64_t filter_moments_cuda_workspace(const FilterMomentsItem* items, int64_t count);

// Launches on `stream` of the current device and returns without waiting. `workspace` is
// 256-byte-aligned device memory of at least filter_moments_cuda_workspace() bytes.
// dtype f64 is not supported on the GPU. Throws std::runtime_error on a launch error.
void filter_moments_cuda(const FilterMomentsItem* items, int64_t count, void* workspace,
                         void* stream);

}  // namespace tk
