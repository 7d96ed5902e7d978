// What the ops over parameters (ops.h) read and write for one tensor of a list: sums over the
// elements of each output filter (row), of each input channel (column), or both from one read.
//
// A parameter is a dense block of rows × channels × kernel elements, stored in one of two orders:
//   contiguous     element (r, c, k) at (r·channels + c)·kernel + k
//   channels last  element (r, c, k) at (r·kernel + k)·channels + c
// Row r of `rows` belongs to group r / (rows / groups); the column of element (r, c, k) is
// group(r)·channels + c, so a grouped convolution's columns are its real input channels.
//
// Outputs: row_out [rows, sums] and col_out [groups·channels, sums], contiguous; either may be
// null. float32, or float64 where dtype is f64. Sums run in float32 at least, in an order that
// depends on the parameter's shape alone: same bits whatever the threads, the rest of the list or
// its split.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/item_list.h"

namespace tk {

struct ParameterItem {
  const void* weight;
  const void* grad;  // the gradient; null for an op that reads none
  const void* hvp;   // a Hessian-vector product; null for an op that reads none
  int64_t rows;
  int64_t channels;
  int64_t kernel;
  int64_t groups;  // divides rows
  void* row_out;
  void* col_out;
  DType dtype;
  bool channels_last;
  uint32_t stream;  // of random signs, for an op that draws some (philox.h)
};

using ParameterList = ItemList<ParameterItem>;

}  // namespace tk
