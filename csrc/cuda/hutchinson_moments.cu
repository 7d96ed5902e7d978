#include "common/philox.h"
#include "cuda/parameter_tasks.cuh"

namespace tk {
namespace {

struct HutchinsonMoments : ParameterOp {
  static constexpr const char* kName = "hutchinson_moments";
  static constexpr int kSums = 1;
  static constexpr Operand kOperand = Operand::random_sign;

  uint64_t seed;

  explicit HutchinsonMoments(uint64_t key) : seed(key) {}

  static void set_inputs(Task& task, const ParameterItem& item) {
    tk::set_inputs(task, item.weight, item.hvp, item.dtype);
    task.stream = item.stream;
  }

  __device__ uint32_t signs(uint32_t stream, int64_t element) const {
    return random_signs_at(seed, stream, element);
  }

  static __device__ void add(float (&sums)[kSums], float w, float hz, float z) {
    sums[0] = __fmaf_rn(w, __fmul_rn(w, __fmul_rn(z, hz)), sums[0]);
  }
};

}  // namespace

TK_DEFINE_PARAMETER_OP(hutchinson_moments, HutchinsonMoments(call.seed))

}  // namespace tk
