#include "common/ops.h"
#include "cuda/task_launch.cuh"

namespace tk {
namespace {

struct GateGradients {
  static constexpr const char* kName = "gate_gradients";
  static constexpr int kSums = 1;
  static constexpr bool kRows = false;
  static constexpr Operand kOperand = Operand::channel_bias;
  static constexpr bool kList = false;

  static __device__ void add(float (&sums)[kSums], float y, float dy, float bias) {
    sums[0] = __fmaf_rn(__fsub_rn(y, bias), dy, sums[0]);
  }
};

// Contiguous positions are rows to sum; else an example is a group whose columns are the channels.
std::vector<Task> make_tasks(const GateGradientsArgs& args) {
  if (args.batch * args.outer * args.channels * args.inner == 0) return {};
  Task task = {};
  set_inputs(task, args.output, args.grad_output, args.dtype);
  task.c = args.bias;
  if (args.outer == 1) {
    task.rows = args.batch * args.channels;
    task.columns = args.inner;
    task.run = args.channels;
    task.row_out = static_cast<float*>(args.out);
    plan_rows(task);
  } else {
    task.groups = static_cast<uint32_t>(args.batch);
    task.rows = args.outer;
    task.columns = args.channels;
    task.run = args.inner;
    task.col_out = static_cast<float*>(args.out);
    plan_matrix(task);
  }
  return {task};
}

}  // namespace

int64_t gate_gradients_cuda_workspace(const GateGradientsArgs& args) {
  return workspace_bytes<GateGradients>(make_tasks(args));
}

void gate_gradients_cuda(const GateGradientsArgs& args, void* workspace, void* stream) {
  run_tasks(GateGradients(), make_tasks(args), workspace, stream);
}

}  // namespace tk
