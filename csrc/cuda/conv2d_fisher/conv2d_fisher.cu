#include "common/ops.h"
#include "cuda/conv2d_fisher/direct.cuh"
#include "cuda/conv2d_fisher/implicit_gemm.cuh"
#include "cuda/conv2d_fisher/launch_plan.cuh"
#include "cuda/conv2d_fisher/pipelined_gemm.cuh"
#include "cuda/conv2d_fisher/turn.cuh"
#include "cuda/task_launch.cuh"

namespace tk {
namespace {

struct Conv2dFisher {  // for finish_kernel
  static constexpr const char* kName = "conv2d_fisher";
  static constexpr int kSums = 1;
};

// What is launched of a plan: a slice of its examples, in so many blocks.
struct Launch {
  FisherKernel kernel;
  FisherTask task;
  int64_t blocks;
  cudaStream_t stream;
};

template <class Product, class Tile>
void launch_gemm(const Launch& to) {
  launch_with_shared(Conv2dFisher::kName, to.stream, to.blocks,
                     TileMemory<Product, Tile>::shared(to.task), fisher_gemm_kernel<Product, Tile>,
                     to.task);
}

template <class Product, class Tile>
void launch_pipelined(const Launch& to) {
  using Memory = PipelineMemory<Product, Tile>;
  const int limit = shared_limit(Conv2dFisher::kName) - int{sizeof(TilePlace)};
  FisherTask task = to.task;
  task.stages = static_cast<uint8_t>(Memory::stages(task, limit));
  launch_with_shared(Conv2dFisher::kName, to.stream, to.blocks, Memory::shared(task, limit),
                     fisher_pipelined_kernel<Product, Tile>, task);
}

template <bool kChannelsInside>
void launch_tile(const Launch& to, DType dtype, bool tf32) {
  with_element(dtype, [&](auto element) {
    constexpr DType kType = decltype(element)::kType;
    if (kType == DType::f32 && !tf32) {
      using Product = Fma<kChannelsInside>;
      if (to.kernel == FisherKernel::tall) return launch_gemm<Product, TallTile>(to);
      if (to.kernel == FisherKernel::wide) return launch_gemm<Product, WideTile>(to);
      return launch_gemm<Product, SmallTile>(to);
    }
    using Product = Mma<kType, kChannelsInside>;
    if (to.kernel == FisherKernel::block) return launch_pipelined<Product, BlockTile>(to);
    if constexpr (kType == DType::f32) {
      if (to.kernel == FisherKernel::wide) return launch_gemm<Product, WideTile>(to);
    } else if constexpr (kChannelsInside) {
      if (to.kernel == FisherKernel::half_block) {
        return launch_pipelined<Product, HalfBlockTile>(to);
      }
    }
    launch_gemm<Product, SmallTile>(to);
  });
}

template <class E>
void launch_direct(const Launch& to) {
  const auto start = [&](auto* kernel) {
    launch(Conv2dFisher::kName, to.stream, to.blocks, kernel, to.task);
  };
  switch (to.kernel) {
    case FisherKernel::depthwise:
      return start(fisher_direct_kernel<E, 1, kDirectColumns, int32_t>);
    case FisherKernel::square:
      return start(fisher_direct_kernel<E, kDirectSquare, kDirectSquare, int32_t>);
    default:
      return start(fisher_direct_kernel<E, kDirectSquare, kDirectSquare, int64_t>);
  }
}

// Turns some examples of `from`, of which this is the first, to where `to` has them.
void turn_side(const FisherTask& task, FisherSide from, const FisherSide& to, int64_t rows,
               int64_t pixels, int64_t first, int64_t element, cudaStream_t stream) {
  from.data = static_cast<const char*>(from.data) + first * from.example * element;
  TurnTask turned = {from, to, task.groups, rows, to.group, pixels, 0, 0};
  turned.row_tiles = static_cast<uint32_t>(divide_up(to.group, kTurnSide));
  turned.pixel_tiles = static_cast<uint32_t>(divide_up(pixels, kTurnSide));
  turn(Conv2dFisher::kName, stream, element, turned, task.batch);
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
  const FisherPlan whole = plan_norms(args, kWorkspaceBytes);
  const int64_t room =
      whole.parts > 1 ? kWorkspaceBytes / int64_t{sizeof(float)} / whole.parts : kMaxBlocks;
  const int64_t share = std::min(whole.slice, std::max<int64_t>(1, room));
  const auto share_at = [&](int64_t first) {
    Conv2dFisherArgs some = args;
    const int64_t x = args.groups * args.channels * args.image.h * args.image.w;
    const int64_t dy = args.groups * args.filters * args.out_image.h * args.out_image.w;
    some.batch = std::min(share, args.batch - first);
    some.input = static_cast<const char*>(args.input) + first * x * size_of(args.dtype);
    some.grad_output =
        static_cast<const char*>(args.grad_output) + first * dy * size_of(args.dtype);
    some.out = static_cast<float*>(args.out) + first;
    return some;
  };
  const int64_t floats = plan_norms(share_at(0), kWorkspaceBytes).workspace_floats();
  void* workspace = workspace_of(floats, allocate);
  for (int64_t first = 0; first < args.batch; first += share) {
    const Conv2dFisherArgs some = share_at(first);
    run_fisher(plan_norms(some, kWorkspaceBytes), some, workspace, stream);
  }
}

void run_fisher(const FisherPlan& plan, const Conv2dFisherArgs& args, void* workspace,
                void* stream) {
  const int64_t element = size_of(args.dtype);
  auto* out = static_cast<float*>(args.out);
  auto* parts = static_cast<float*>(workspace);
  Launch next = {plan.kernel, plan.task, 0, static_cast<cudaStream_t>(stream)};
  FisherTask& task = next.task;
  float* turned = parts + plan.part_floats();
  if (plan.turns_x) task.x.data = turned;
  if (plan.turns_x) turned += turned_floats(task.x, plan.slice, element);
  if (plan.turns_dy) task.dy.data = turned;
  task.out = plan.parts > 1 ? parts : out;
  for (int64_t first = 0; first < plan.task.batch; first += plan.slice) {
    task.batch = std::min(plan.slice, plan.task.batch - first);
    next.blocks = plan.tiles * divide_up(task.batch, task.split);
    if (plan.turns_x) {
      turn_side(task, plan.x, task.x, task.channels, args.image.h * args.image.w, first, element,
                next.stream);
    } else if (first > 0) {
      task.x.data = static_cast<const char*>(task.x.data) + plan.slice * task.x.example * element;
    }
    if (plan.turns_dy) {
      turn_side(task, plan.dy, task.dy, task.filters, task.positions, first, element, next.stream);
    } else if (first > 0) {
      task.dy.data =
          static_cast<const char*>(task.dy.data) + plan.slice * task.dy.example * element;
    }
    if (plan.is_direct()) {
      with_element(args.dtype, [&](auto e) { launch_direct<decltype(e)>(next); });
    } else if (plan.channels_inside) {
      launch_tile<true>(next, args.dtype, args.tf32);
    } else {
      launch_tile<false>(next, args.dtype, args.tf32);
    }
    task.adds = true;
  }
  if (plan.parts > 1) finish(plan, parts, out, next.stream);
}

}  // namespace tk
