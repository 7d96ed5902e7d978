#include "cuda/parameter_tasks.cuh"

namespace tk {
namespace {

struct SecondOrderMoments : ParameterOp {
  static constexpr const char* kName = "second_order_moments";
  static constexpr int kSums = 2;
  static constexpr Operand kOperand = Operand::tensor;

  static void set_inputs(Task& task, const ParameterItem& item) {
    tk::set_inputs(task, item.weight, item.grad, item.hvp, item.dtype);
  }

  static __device__ void add(float (&sums)[kSums], float w, float g, float h) {
    const float q = __fmul_rn(w, __fmaf_rn(-0.5f, h, g));
    sums[0] = __fadd_rn(sums[0], q);
    sums[1] = __fmaf_rn(q, q, sums[1]);
  }
};

}  // namespace

TK_DEFINE_PARAMETER_OP(second_order_moments, SecondOrderMoments())

}  // namespace tk
