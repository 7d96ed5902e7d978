// second_order_moments: per filter, over its elements of a weight w, its gradient g and h = Hv,
//   ( Σ q, Σ q² )  with  q = w·(g − ½h),
// for output filters, input channels, or both: parameter.h.
#pragma once

#include "common/parameter.h"

namespace tk {

constexpr int kSecondOrderSums = 2;

void second_order_moments_cpu(const ParameterItem* items, int64_t count, int threads);

// As those of filter_moments.h.
int64_t second_order_moments_cuda_workspace(const ParameterItem* items, int64_t count);
void second_order_moments_cuda(const ParameterItem* items, int64_t count, void* workspace,
                               void* stream);

}  // namespace tk
