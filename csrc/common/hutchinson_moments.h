// hutchinson_moments: per filter, over its elements k of a weight w and of the product Hz,
//   Σ w_k² z_k (Hz)_k
// for output filters, input channels, or both: parameter.h. z are the random signs of philox.h for
// the call's seed and the item's stream, of elements numbered as they are stored; they are drawn
// where they are needed, never read.
#pragma once

#include "common/parameter.h"

namespace tk {

void hutchinson_moments_cpu(const ParameterItem* items, int64_t count, int threads, uint64_t seed);

// As those of filter_moments.h.
int64_t hutchinson_moments_cuda_workspace(const ParameterItem* items, int64_t count);
void hutchinson_moments_cuda(const ParameterItem* items, int64_t count, void* workspace,
                             void* stream, uint64_t seed);

}  // namespace tk
