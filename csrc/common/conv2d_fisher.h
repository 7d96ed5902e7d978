// conv2d_fisher: the sum over examples of squared per-example weight gradients of a convolution,
//   g[n, o, c, i, j] = Σ_{h, w} dy[n, o, h, w] · x[n, c', h·stride_h − pad_h + i·dilation_h,
//                                                         w·stride_w − pad_w + j·dilation_w]
//   fisher[o, c, i, j] = Σ_n g[n, o, c, i, j]²
// with c' = c + channels of the groups before o's, and x = 0 outside of the image. With a weight,
//   out[o] = Σ_{c, i, j} weight[o, c, i, j]² · fisher[o, c, i, j]
// and no fisher is written. conv2d_example_norms sums the same squares over the weight instead,
//   out[n] = Σ_{o, c, i, j} g[n, o, c, i, j]²
// and takes no weight. A linear layer over tokens is a 1×1 convolution whose positions they
// are: height = tokens, width = 1, channels last.
//
// x is [batch, groups·channels, height, width] and dy [batch, groups·filters, out_height,
// out_width], dense; the flags say whose channels lie innermost in memory. weight is contiguous
// [groups·filters, channels, kernel_h, kernel_w] and may have another dtype than x and dy.
// out is float32 (float64 for f64): the weight's shape, contiguous, or [groups·filters], or
// [batch]. No extent is zero. Sums run in float32 at least, in an order that depends on the shape
// and the layout alone. No tensor of batch times the weight's size exists anywhere.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace tk {

// The two sizes of an image, or a step along its two axes.
struct Extent2d {
  int64_t h;
  int64_t w;
};

struct Conv2dFisherArgs {
  const void* input;        // x
  const void* grad_output;  // dy
  const void* weight;       // or null
  void* out;
  int64_t batch;
  int64_t groups;
  int64_t channels;  // of x, per group
  int64_t filters;   // of dy, per group
  Extent2d image;
  Extent2d out_image;
  Extent2d kernel;
  Extent2d stride;
  Extent2d padding;
  Extent2d dilation;
  DType dtype;         // of x and dy
  DType weight_dtype;  // that of x and dy, or f32
  bool input_channels_last;
  bool grad_channels_last;
  bool tf32;  // f32 products may be rounded to TF32: what PyTorch's own setting allows
};

}  // namespace tk
