// filter_moments: per filter f, over its elements e of a weight w and its gradient g,
//   out[f] = ( Σ gw, Σ (gw)², Σ |gw|, Σ w², Σ g² )
// for output filters, input channels, or both: parameter.h.
#pragma once

#include "common/parameter.h"

namespace tk {

constexpr int kMoments = 5;

void filter_moments_cpu(const ParameterItem* items, int64_t count, int threads);

// Bytes of device memory that filter_moments_cuda needs beside inputs and outputs; 0 is possible.
int64_t filter_moments_cuda_workspace(const ParameterItem* items, int64_t count);

// Launches on `stream` of the current device and returns without waiting. `workspace` is
// 256-byte-aligned device memory of at least filter_moments_cuda_workspace() bytes.
// dtype f64 is not supported on the GPU. Throws std::runtime_error on a launch error.
void filter_moments_cuda(const ParameterItem* items, int64_t count, void* workspace, void* stream);

}  // namespace tk
