// How conv2d_fisher is cut into blocks of threads, from its shape and layout alone; only what a
// load takes at once depends on addresses too, and changes nothing of what is summed.
//
// Of one group and example, g = dy · xᵀ is a product of two matrices: dy has a row per filter, x a
// row per column of the weight (a channel at a tap), and both are summed along the positions of
// the output. Two kernels compute it:
//   implicit GEMM  a block takes a tile of filters × columns, and all positions of one example
//   after
//                  the other; for every group that fills a tile well enough
//   direct         a group of lanes takes a few filters × columns and shares the positions; for
//                  depthwise and other small groups, and with its 64-bit offsets for examples of
//                  2^30 elements and more
// Both keep g and the sum of its squares in registers, and split the examples where there are too
// few tiles or lane groups to fill a GPU: splits write parts, which finish_kernel adds in order.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/conv2d_fisher.h"
#include "cuda/task_plan.h"

namespace tk {

// x / divisor for x < 2^31, by a multiplication.
struct Divider {
  uint32_t magic;
  uint32_t shift;
};

inline Divider divider(int64_t divisor) {
  uint32_t shift = 0;
  while (int64_t{1} << shift < divisor) ++shift;
  const uint64_t excess = (uint64_t{1} << shift) - divisor;
  return {static_cast<uint32_t>((excess << 32) / divisor + 1), shift};
}

// x or dy: elements between two examples, groups, rows (channels or filters) and pixels.
struct FisherSide {
  const void* data;
  int64_t example;
  int64_t group;
  int64_t row;
  int64_t pixel;
  int32_t bytes;  // that a load takes at once: 16, 4, or the size of an element
};

struct FisherTask {
  FisherSide x;
  FisherSide dy;
  const void* weight;  // or null
  float* out;          // [splits, weight's size], [splits, column tiles, all filters] or, of norms,
                       // [tiles or blocks of lane groups, batch]
  int64_t batch;
  int64_t split;       // examples that a block takes
  int64_t norm_parts;  // of norms: blocks that a split, one example, has; else 0
  int64_t groups;
  int64_t filters;   // of a group
  int64_t channels;  // of a group
  int64_t columns;   // of a group: channels · taps
  int64_t taps;
  int64_t positions;  // of the output
  Extent2d image, out_image, kernel, stride, padding, dilation;
  Divider by_out_width;
  uint32_t filter_tiles;  // of a group
  uint32_t column_tiles;
  bool weight_is_f32;  // else it has the inputs' dtype
  bool is_matrix;      // x is [channels, positions] as it stands: 1×1, stride 1, no padding
  uint8_t buffers;     // implicit GEMM: see kMaxBuffers
  bool spans;          // implicit GEMM: an example has more positions than a span
  uint8_t lanes_log2;  // direct: lanes of a warp, and warps, that share the positions
  uint8_t warps_log2;
};

// A block of 256 threads: 8 warps, each with 32 filters × 4 · kLaneColumns columns.
template <int kDown, int kAcross, int kLane>
struct Tile {
  static_assert(kDown * kAcross == kWarps);
  static constexpr int kWarpsAcross = kAcross;
  static constexpr int kLaneColumns = kLane;
  static constexpr int kWarpColumns = 4 * kLane;
  static constexpr int kFilters = 32 * kDown;
  static constexpr int kColumns = kWarpColumns * kAcross;
};
using TallTile = Tile<4, 2, 8>;   // 128 × 64: the more filters, the fewer gathers of x
using WideTile = Tile<2, 4, 8>;   // 64 × 128
using SmallTile = Tile<1, 8, 4>;  // 32 × 128

// Positions whose products are summed one after the other; longer examples are sums of such sums.
// Tensor cores align the products of a step, and the sum so far, to the largest of them and cut off
// what lies 24 bits below (25 on Hopper). bfloat16 products of 16 bits lose little to it, those of
// 22 bits of the other types about twice as much: where all terms have one sign, spans of 128 and
// of 64 positions cost up to 8 and 14 units of eps32 · Σ|terms|, twice as many positions 18 and 29.
constexpr int kSpan = 128;
constexpr int span_of(DType dtype, bool tensor_cores) {
  return tensor_cores && dtype != DType::bf16 ? kSpan / 2 : kSpan;
}
// Spans that are summed so, and examples whose squares are.
constexpr int kSpans = 128;
constexpr int kRun = 256;

// Copies in shared memory of a lane's sums: 0 for few short examples, 2 for the longest.
constexpr int kMaxBuffers = 2;

// Blocks should have this many chunks of positions to go through, so that a split is worth it.
constexpr int kMinChunks = 8;

// What a lane group keeps in registers: filters × columns. Depthwise 3×3 is the work of one.
constexpr int kDirectColumns = 9;
constexpr int kDirectSquare = 4;
// Positions of a lane before more warps join its lane group.
constexpr int kLanePositions = 16;

// Counted in instructions, a product costs the direct kernel about 5, and a tile 1/16 on tensor
// cores or 1 elsewhere, where its empty rows and columns are multiplied too: so many times the
// products may be empty. Tensor cores have the waiting for their loads against them.
constexpr int kMostEmptyMma = 32;
constexpr int kMostEmpty = 4;

enum class FisherKernel { tall, wide, small, depthwise, square, square64 };

struct FisherPlan {
  FisherTask task;
  FisherKernel kernel;
  bool channels_inside;  // in memory, of both x and dy: the tile kernel's order
  int64_t splits;
  int64_t blocks;
  int64_t results;  // elements of the output
  int64_t parts;    // of every result; with one, blocks write to the output itself

  bool is_direct() const { return kernel >= FisherKernel::depthwise; }
  int64_t workspace_floats() const { return parts > 1 ? parts * results : 0; }
};

inline int64_t padded_area(const FisherTask& task, int64_t tile_filters, int64_t tile_columns) {
  return divide_up(task.filters, tile_filters) * tile_filters *
         divide_up(task.columns, tile_columns) * tile_columns;
}

// Offsets inside an example fit 32 bits, those of pixels around the image included.
inline bool is_small_example(const Conv2dFisherArgs& args) {
  const double x = static_cast<double>(args.groups * args.channels) *
                   (static_cast<double>(args.image.h) + 2.0 * static_cast<double>(args.padding.h)) *
                   (static_cast<double>(args.image.w) + 2.0 * static_cast<double>(args.padding.w));
  const double dy = static_cast<double>(args.groups * args.filters) *
                    static_cast<double>(args.out_image.h * args.out_image.w);
  return std::max({x, dy, static_cast<double>(args.batch)}) < 1 << 30;
}

inline void set_sides(FisherPlan& plan, const Conv2dFisherArgs& args) {
  FisherTask& task = plan.task;
  const int64_t pixels = args.image.h * args.image.w;
  bool x_last = args.input_channels_last;
  bool dy_last = args.grad_channels_last;
  // With one pixel or one channel both orders are the same memory.
  const bool x_either = pixels == 1 || args.groups * args.channels == 1;
  const bool dy_either = task.positions == 1 || args.groups * args.filters == 1;
  if (x_either) x_last = dy_either || dy_last;
  if (dy_either) dy_last = x_last;
  plan.channels_inside = x_last && dy_last;

  const int64_t element = size_of(args.dtype);
  const auto side = [&](const void* data, int64_t rows, int64_t extent, bool last) {
    const int64_t all = args.groups * rows;
    FisherSide side = {data,
                       all * extent,
                       rows * (last ? 1 : extent),
                       last ? 1 : extent,
                       last ? all : 1,
                       static_cast<int32_t>(element)};
    const int64_t run = (last ? rows : extent) * element;  // bytes side by side, in that order
    for (const int32_t bytes : {16, 4}) {
      if (last == plan.channels_inside && run % bytes == 0 &&
          reinterpret_cast<uintptr_t>(data) % bytes == 0) {
        side.bytes = bytes;
        break;
      }
    }
    return side;
  };
  task.x = side(args.input, args.channels, pixels, x_last);
  if (!plan.channels_inside && !task.is_matrix) task.x.bytes = static_cast<int32_t>(element);
  task.dy = side(args.grad_output, args.filters, task.positions, dy_last);
}

inline FisherTask shape_of(const Conv2dFisherArgs& args) {
  FisherTask task = {};
  task.weight = args.weight;
  task.batch = args.batch;
  task.groups = args.groups;
  task.filters = args.filters;
  task.channels = args.channels;
  task.taps = args.kernel.h * args.kernel.w;
  task.columns = args.channels * task.taps;
  task.positions = args.out_image.h * args.out_image.w;
  task.image = args.image;
  task.out_image = args.out_image;
  task.kernel = args.kernel;
  task.stride = args.stride;
  task.padding = args.padding;
  task.dilation = args.dilation;
  task.weight_is_f32 = args.weight_dtype == DType::f32;
  task.is_matrix = task.taps == 1 && args.stride.h == 1 && args.stride.w == 1 &&
                   args.padding.h == 0 && args.padding.w == 0;
  return task;
}

// Sets the kernel and how many of its tiles or lane groups a group has; returns their blocks.
inline int64_t choose_kernel(FisherPlan& plan, const Conv2dFisherArgs& args) {
  FisherTask& task = plan.task;
  const int64_t area = task.filters * task.columns;
  plan.kernel = FisherKernel::tall;
  int64_t filters = TallTile::kFilters;
  int64_t columns = TallTile::kColumns;
  int64_t least = padded_area(task, filters, columns);
  const auto consider = [&](FisherKernel kernel, int64_t tile_filters, int64_t tile_columns) {
    const int64_t padded = padded_area(task, tile_filters, tile_columns);
    if (padded >= least) return;
    plan.kernel = kernel;
    filters = tile_filters;
    columns = tile_columns;
    least = padded;
  };
  consider(FisherKernel::wide, WideTile::kFilters, WideTile::kColumns);
  consider(FisherKernel::small, SmallTile::kFilters, SmallTile::kColumns);

  const bool mma = args.dtype != DType::f32 || args.tf32;
  if (!is_small_example(args)) {
    plan.kernel = FisherKernel::square64;
  } else if (area * (mma ? kMostEmptyMma : kMostEmpty) < least) {
    plan.kernel = task.filters == 1 ? FisherKernel::depthwise : FisherKernel::square;
  }
  if (plan.is_direct()) {
    filters = plan.kernel == FisherKernel::depthwise ? 1 : kDirectSquare;
    columns = plan.kernel == FisherKernel::depthwise ? kDirectColumns : kDirectSquare;
  }
  task.filter_tiles = static_cast<uint32_t>(divide_up(task.filters, filters));
  task.column_tiles = static_cast<uint32_t>(divide_up(task.columns, columns));
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
  const int64_t blocks = choose_kernel(plan, args);

  const int64_t filters = task.groups * task.filters;
  plan.results = task.weight ? filters : filters * task.columns;
  const int64_t parts = task.weight ? task.column_tiles : 1;  // of a split
  const int64_t chunk = 64 / size_of(args.dtype);
  const int64_t chunks = task.batch * divide_up(task.positions, chunk);
  const int64_t most =
      std::min({task.batch, divide_up(chunks, kMinChunks),
                workspace_bytes / int64_t{sizeof(float)} / (parts * plan.results)});
  const int64_t wanted = std::max(divide_up(kFillBlocks, blocks), divide_up(task.batch, kRun));
  const int64_t splits = std::max<int64_t>(1, std::min(wanted, most));
  task.split = divide_up(task.batch, splits);
  const int64_t span = span_of(args.dtype, args.dtype != DType::f32 || args.tf32);
  task.spans = task.positions > span;
  task.buffers = task.positions > span * kSpans    ? kMaxBuffers
                 : task.spans || task.split > kRun ? 1
                                                   : 0;
  plan.splits = divide_up(task.batch, task.split);
  plan.parts = plan.splits * parts;
  plan.blocks = blocks * plan.splits;
  return plan;
}

// The same for the norms of examples: a block takes a tile, or lane groups, of one example, and
// leaves one part of its norm.
inline FisherPlan plan_norms(const Conv2dFisherArgs& args) {
  FisherPlan plan = {};
  plan.task = shape_of(args);
  FisherTask& task = plan.task;
  set_sides(plan, args);
  plan.parts = choose_kernel(plan, args);
  plan.splits = plan.results = task.batch;
  plan.blocks = plan.parts * plan.splits;
  const int64_t span = span_of(args.dtype, args.dtype != DType::f32 || args.tf32);
  task.norm_parts = plan.parts;
  task.split = 1;
  task.spans = task.positions > span;
  task.buffers = task.positions > span * kSpans ? kMaxBuffers : task.spans ? 1 : 0;
  return plan;
}

// conv2d_fisher_cuda or conv2d_example_norms_cuda as planned.
void run_fisher(FisherPlan plan, const Conv2dFisherArgs& args, void* workspace, void* stream);

}  // namespace tk
