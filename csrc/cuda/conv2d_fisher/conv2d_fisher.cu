#include "common/ops.h"
#include "cuda/conv2d_fisher/direct.cuh"
#include "cuda/conv2d_fisher/implicit_gemm.cuh"
#include "cuda/task_launch.cuh"

namespace tk {
namespace {

struct Conv2dFisher {  // for finish_kernel
  static constexpr const char* kName = "conv2d_fisher";
  static constexpr int kSums = 1;
};

template <class Product, class Tile>
void launch_gemm(const FisherPlan& plan, cudaStream_t stream) {
  launch_with_shared(Conv2dFisher::kName, stream, plan.blocks,
                     TileMemory<Product, Tile>::shared(plan.task),
                     fisher_gemm_kernel<Product, Tile>, plan.task);
}

template <class Product>
void launch_gemm(const FisherPlan& plan, cudaStream_t stream) {
  switch (plan.kernel) {
    case FisherKernel::tall:
      return launch_gemm<Product, TallTile>(plan, stream);
    case FisherKernel::wide:
      return launch_gemm<Product, WideTile>(plan, stream);
    default:
      return launch_gemm<Product, SmallTile>(plan, stream);
  }
}

template <bool kChannelsInside>
void launch_gemm(const FisherPlan& plan, DType dtype, bool tf32, cudaStream_t stream) {
  with_element(dtype, [&](auto element) {
    constexpr DType kType = decltype(element)::kType;
    if (kType == DType::f32 && !tf32) return launch_gemm<Fma<kChannelsInside>>(plan, stream);
    launch_gemm<Mma<kType, kChannelsInside>>(plan, stream);
  });
}

template <class E>
void launch_direct(const FisherPlan& plan, cudaStream_t stream) {
  const auto start = [&](auto* kernel) {
    launch(Conv2dFisher::kName, stream, plan.blocks, kernel, plan.task);
  };
  switch (plan.kernel) {
    case FisherKernel::depthwise:
      return start(fisher_direct_kernel<E, 1, kDirectColumns, int32_t>);
    case FisherKernel::square:
      return start(fisher_direct_kernel<E, kDirectSquare, kDirectSquare, int32_t>);
    default:
      return start(fisher_direct_kernel<E, kDirectSquare, kDirectSquare, int64_t>);
  }
}

void launch_direct(const FisherPlan& plan, DType dtype, cudaStream_t stream) {
  with_element(dtype, [&](auto element) { launch_direct<decltype(element)>(plan, stream); });
}

// The results' parts are a table whose rows finish_kernel adds.
void finish(const FisherPlan& plan, const float* parts, float* out, cudaStream_t stream) {
  TaskTable<1> table = {};
  table.count = 1;
  Task& task = table.tasks[0];
  task.rows = plan.results;
  task.tiles = static_cast<uint32_t>(plan.parts);
  task.row_out = out;
  launch_early(Conv2dFisher::kName, stream, row_axis(task).blocks(Conv2dFisher::kSums),
               finish_kernel<Conv2dFisher, 1>, table, parts);
}

}  // namespace

void conv2d_fisher_cuda(const Conv2dFisherArgs& args, const Allocate& allocate, void* stream) {
  const FisherPlan plan = plan_fisher(args, kWorkspaceBytes);
  run_fisher(plan, args, workspace_of(plan.workspace_floats(), allocate), stream);
}

// As many examples at a time as leave their parts in the workspace.
void conv2d_example_norms_cuda(const Conv2dFisherArgs& args, const Allocate& allocate,
                               void* stream) {
  const int64_t parts = plan_norms(args).parts;
  const int64_t room = parts > 1 ? kWorkspaceBytes / int64_t{sizeof(float)} : kMaxBlocks;
  const int64_t share = std::min(args.batch, std::max<int64_t>(1, room / parts));
  void* workspace = workspace_of(parts > 1 ? share * parts : 0, allocate);
  const int64_t x = args.groups * args.channels * args.image.h * args.image.w;
  const int64_t dy = args.groups * args.filters * args.out_image.h * args.out_image.w;
  for (int64_t first = 0; first < args.batch; first += share) {
    Conv2dFisherArgs some = args;
    some.batch = std::min(share, args.batch - first);
    some.input = static_cast<const char*>(args.input) + first * x * size_of(args.dtype);
    some.grad_output =
        static_cast<const char*>(args.grad_output) + first * dy * size_of(args.dtype);
    some.out = static_cast<float*>(args.out) + first;
    run_fisher(plan_norms(some), some, workspace, stream);
  }
}

void run_fisher(FisherPlan plan, const Conv2dFisherArgs& args, void* workspace, void* stream) {
  auto* on = static_cast<cudaStream_t>(stream);
  auto* out = static_cast<float*>(args.out);
  auto* parts = static_cast<float*>(workspace);
  plan.task.out = plan.parts > 1 ? parts : out;
  if (plan.is_direct()) {
    launch_direct(plan, args.dtype, on);
  } else if (plan.channels_inside) {
    launch_gemm<true>(plan, args.dtype, args.tf32, on);
  } else {
    launch_gemm<false>(plan, args.dtype, args.tf32, on);
  }
  if (plan.parts > 1) finish(plan, parts, out, on);
}

}  // namespace tk
