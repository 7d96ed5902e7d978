// gate_gradients: the gradient of a gate (a factor of 1) on every channel of a layer's output,
// per example:  out[n, c] = Σ_{a, b} (y[n, a, c, b] − bias[c]) · dy[n, a, c, b]
//
// y (output) and dy (grad_output) are dense [batch, outer, channels, inner] blocks: [N, C, H, W]
// has outer = 1 and inner = H·W, channels_last and [N, T, C] have outer = positions and inner = 1.
// bias has the dtype of y, or is null. out is [batch, channels], float32 (float64 for f64).
// Sums run in float32 at least, in an order that depends on the shape alone.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace tk {

struct GateGradientsArgs {
  const void* output;
  const void* grad_output;
  const void* bias;  // or null
  void* out;
  int64_t batch;
  int64_t outer;
  int64_t channels;
  int64_t inner;
  DType dtype;
};

}  // namespace tk
