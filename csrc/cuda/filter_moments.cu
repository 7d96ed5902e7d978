#include "cuda/parameter_tasks.cuh"

namespace tk {
namespace {

struct FilterMoments : ParameterOp {
  static constexpr const char* kName = "filter_moments";
  static constexpr int kSums = 5;

  static void set_inputs(Task& task, const ParameterItem& item) {
    tk::set_inputs(task, item.weight, item.grad, item.dtype);
  }

  static __device__ void add(float (&sums)[kSums], float w, float g, float) {
    const float gw = __fmul_rn(g, w);
    sums[0] = __fadd_rn(sums[0], gw);
    sums[1] = __fmaf_rn(gw, gw, sums[1]);
    sums[2] = __fadd_rn(sums[2], fabsf(gw));
    sums[3] = __fmaf_rn(w, w, sums[3]);
    sums[4] = __fmaf_rn(g, g, sums[4]);
  }
};

}  // namespace

TK_DEFINE_PARAMETER_OP(filter_moments, FilterMoments())

}  // namespace tk
