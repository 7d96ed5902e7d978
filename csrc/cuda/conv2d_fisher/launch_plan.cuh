// How conv2d_fisher is cut into blocks of threads, from its shape and layout alone; only what a
// load takes at once depends on addresses too, and changes nothing of what is summed.
//
// Of one group and example, g = dy · xᵀ is a product of two matrices: dy has a row per filter, x a
// row per column of the weight (a channel at a tap), and both are summed along the positions of
// the output. Two kernels compute it:
//   implicit GEMM  a block takes a tile of filters × columns, and all positions of one example
//   after
//                  the other; for every group that fills a tile well enough. On tensor cores it is
//                  pipelined, but for few filters and for what is not worth turning (turn_plan.cuh)
//   direct         a group of lanes takes a few filters × columns and shares the positions; for
//                  depthwise and other small groups, and with its 64-bit offsets for examples of
//                  2^30 elements and more
// Both keep g and the sum of its squares in registers, and split the examples where there are too
// few tiles or lane groups to fill a GPU: splits write parts, which finish_kernel adds in order.
#pragma once

#include "cuda/conv2d_fisher/turn_plan.cuh"

namespace tk {

// Sets the kernel, its layout and how many of its tiles or lane groups a group has; returns their
// blocks.
inline int64_t choose_kernel(FisherPlan& plan, const Conv2dFisherArgs& args,
                             int64_t workspace_bytes) {
  FisherTask& task = plan.task;
  const bool mma = args.dtype != DType::f32 || args.tf32;
  int64_t filters = 0;
  int64_t columns = 0;
  int64_t least_area = INT64_MAX;
  int64_t least = INT64_MAX;
  const auto consider = [&](auto tile, FisherKernel kernel, int64_t channels, int64_t cost) {
    using Tile = decltype(tile);
    const int64_t padded = divide_up(task.filters, Tile::kFilters) * Tile::kFilters *
                           divide_up(channels * task.taps, Tile::kColumns) * Tile::kColumns;
    least_area = std::min(least_area, padded);
    if (padded * cost >= least) return;
    plan.kernel = kernel;
    filters = Tile::kFilters;
    columns = Tile::kColumns;
    least = padded * cost;
  };
  plan.slice = task.batch;
  PipelineLayout layout = {};
  const bool is_small = is_small_example(args);
  if (mma) {
    const TileCosts costs = tile_costs(args.dtype);
    if (is_small) layout = pipeline_layout(plan, args, workspace_bytes);
    // Two buffers of the larger tile's sums would leave no shared memory for chunks.
    const bool two_buffers = task.positions > span_of(args.dtype, mma) * kSpans;
    if (layout.fits && !two_buffers) {
      consider(BlockTile{}, FisherKernel::block, layout.channels, costs.block);
    }
    if (args.dtype == DType::f32) {
      consider(WideTile{}, FisherKernel::wide, task.channels, costs.wide);
    } else if (layout.fits && (plan.channels_inside || layout.needs_room)) {
      // Of 1×1 convolutions, channels outside, few filters are bound by memory in either tile.
      consider(HalfBlockTile{}, FisherKernel::half_block, layout.channels, costs.half_block);
    }
    consider(SmallTile{}, FisherKernel::small, task.channels, costs.small);
  } else {
    consider(TallTile{}, FisherKernel::tall, task.channels, 1);
    consider(WideTile{}, FisherKernel::wide, task.channels, 1);
    consider(SmallTile{}, FisherKernel::small, task.channels, 1);
  }

  if (!is_small) {
    plan.kernel = FisherKernel::square64;
  } else if (task.filters * task.columns * (mma ? kMostEmptyMma : kMostEmpty) < least_area) {
    plan.kernel = task.filters == 1 ? FisherKernel::depthwise : FisherKernel::square;
  }
  if (plan.is_direct()) {
    filters = plan.kernel == FisherKernel::depthwise ? 1 : kDirectSquare;
    columns = plan.kernel == FisherKernel::depthwise ? kDirectColumns : kDirectSquare;
  } else if (plan.is_pipelined()) {
    set_layout(plan, args, layout);
  }
  task.filter_tiles = static_cast<uint32_t>(divide_up(task.filters, filters));
  task.column_tiles = static_cast<uint32_t>(divide_up(task.tile_columns(), columns));
  const int64_t units = task.groups * task.filter_tiles * task.column_tiles;
  task.by_out_width = divider(args.out_image.w);
  if (!plan.is_direct()) return units;

  // Neighbouring lanes read neighbouring elements: positions, or channels of different groups.
  // Eight of those are enough where positions are many.
  const int64_t most = task.positions < kSpan * kSpans ? 32 : 8;
  const int64_t neighbours = plan.channels_inside ? floor_log2(std::min(most, task.groups)) : 0;
  task.lanes_log2 = std::min<int64_t>(5 - neighbours, floor_log2(task.positions));
  const int64_t positions = task.positions >> task.lanes_log2;
  task.warps_log2 = std::clamp(floor_log2(std::max<int64_t>(1, positions / kLanePositions)), 0, 3);
  return divide_up(units, kThreads >> task.lanes_log2 >> task.warps_log2);
}

inline FisherPlan plan_fisher(const Conv2dFisherArgs& args, int64_t workspace_bytes) {
  FisherPlan plan = {};
  plan.task = shape_of(args);
  FisherTask& task = plan.task;
  set_sides(plan, args);
  plan.tiles = choose_kernel(plan, args, workspace_bytes);

  const int64_t filters = task.groups * task.filters;
  plan.results = task.weight ? filters : filters * task.columns;
  const int64_t parts = task.weight ? task.column_tiles : 1;  // of a split
  const int64_t chunk = 64 / size_of(args.dtype);
  const int64_t chunks = plan.slice * divide_up(task.positions, chunk);
  const int64_t room = plan.halves_room ? workspace_bytes / 2 : workspace_bytes;
  const int64_t most = std::min({plan.slice, divide_up(chunks, kMinChunks),
                                 room / int64_t{sizeof(float)} / (parts * plan.results)});
  const int64_t wanted = std::max(divide_up(kFillBlocks, plan.tiles), divide_up(plan.slice, kRun));
  const int64_t splits = std::max<int64_t>(1, std::min(wanted, most));
  task.split = divide_up(plan.slice, splits);
  const int64_t span = span_of(args.dtype, args.dtype != DType::f32 || args.tf32);
  task.spans = task.positions > span;
  task.buffers = task.positions > span * kSpans    ? kMaxBuffers
                 : task.spans || task.split > kRun ? 1
                                                   : 0;
  plan.splits = divide_up(plan.slice, task.split);
  plan.parts = plan.splits * parts;
  return plan;
}

// The same for the norms of examples: a block takes a tile, or lane groups, of one example, and
// leaves one part of its norm.
inline FisherPlan plan_norms(const Conv2dFisherArgs& args, int64_t workspace_bytes) {
  FisherPlan plan = {};
  plan.task = shape_of(args);
  FisherTask& task = plan.task;
  set_sides(plan, args);
  plan.parts = plan.tiles = choose_kernel(plan, args, workspace_bytes);
  plan.splits = plan.results = task.batch;
  const int64_t span = span_of(args.dtype, args.dtype != DType::f32 || args.tf32);
  task.norm_parts = plan.parts;
  task.split = 1;
  task.spans = task.positions > span;
  task.buffers = task.positions > span * kSpans ? kMaxBuffers : task.spans ? 1 : 0;
  return plan;
}

// conv2d_fisher_cuda or conv2d_example_norms_cuda as planned.
void run_fisher(const FisherPlan& plan, const Conv2dFisherArgs& args, void* workspace,
                void* stream);

}  // namespace tk
