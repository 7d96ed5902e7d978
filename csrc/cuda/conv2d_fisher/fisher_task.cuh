// What the kernels of conv2d_fisher are told, and the sizes that they are compiled for.
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

  bool is_inside() const { return row == 1; }  // channels or filters, not pixels
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
  int64_t filters;          // of a group
  int64_t channels;         // of a group
  int64_t columns;          // of a group: channels · taps
  int64_t padded_channels;  // as many as a turned x has, else channels
  int64_t taps;
  int64_t positions;  // of the output
  Extent2d image, out_image, kernel, stride, padding, dilation;
  Divider by_out_width;
  uint32_t filter_tiles;  // of a group
  uint32_t column_tiles;
  bool weight_is_f32;  // else it has the inputs' dtype
  bool is_matrix;      // x is [channels, positions] as it stands: 1×1, stride 1, no padding
  bool adds;           // to what is in `out`: squares of the slices before
  uint8_t buffers;     // implicit GEMM: see kMaxBuffers
  uint8_t stages;      // pipelined: see PipelineMemory
  bool spans;          // implicit GEMM: an example has more positions than a span
  uint8_t lanes_log2;  // direct: lanes of a warp, and warps, that share the positions
  uint8_t warps_log2;

  TK_HOST_DEVICE int64_t tile_columns() const { return padded_channels * taps; }
};

// A block of 256 threads: 8 warps, each with 8 · kLaneFilters filters × 4 · kLaneColumns columns.
template <int kDown, int kAcross, int kRows, int kLane>
struct Tile {
  static_assert(kDown * kAcross == kWarps);
  static constexpr int kWarpsAcross = kAcross;
  static constexpr int kLaneFilters = kRows;
  static constexpr int kLaneColumns = kLane;
  static constexpr int kWarpFilters = 8 * kRows;
  static constexpr int kWarpColumns = 4 * kLane;
  static constexpr int kFilters = kWarpFilters * kDown;
  static constexpr int kColumns = kWarpColumns * kAcross;
};
// Of the pipelined kernel.
using BlockTile = Tile<2, 4, 8, 8>;      // 128 × 128
using HalfBlockTile = Tile<2, 4, 4, 8>;  // 64 × 128
// Of the one that loads by way of registers: for floats, and the last for all.
using TallTile = Tile<4, 2, 4, 8>;   // 128 × 64: the more filters, the fewer gathers of x
using WideTile = Tile<2, 4, 4, 8>;   // 64 × 128
using SmallTile = Tile<1, 8, 4, 4>;  // 32 × 128

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

// What a product of a tile costs on tensor cores, padding included: issue slots as
// bench/issue_slots counts them in the machine code, or the tensor core's own time where that is
// more. Floats, which ldmatrix cannot transpose, gain little from the pipelined kernel, and nothing
// in its smaller tile.
struct TileCosts {
  int block;
  int half_block;
  int wide;  // by way of registers
  int small;
  // To turn an element of x or dy costs a read and a write of memory: as much time, at 3 TB/s and
  // by the slots of an H100, as so many products lose that are not pipelined and gather single
  // elements.
  int products_to_turn;
};
constexpr TileCosts kHalfCosts = {8, 11, 0, 20, 100};
constexpr TileCosts kTf32Costs = {10, 0, 12, 20, 700};

inline TileCosts tile_costs(DType dtype) { return dtype == DType::f32 ? kTf32Costs : kHalfCosts; }

enum class FisherKernel { block, half_block, tall, wide, small, depthwise, square, square64 };

struct FisherPlan {
  FisherTask task;
  FisherKernel kernel;
  bool channels_inside;  // in memory, of both x and dy: the tile kernel's order
  bool turns_x;          // for the pipelined kernel, which finds them in the workspace
  bool turns_dy;
  FisherSide x;  // and dy, as they were given
  FisherSide dy;
  bool halves_room;       // between parts and what is turned
  int64_t slice;          // examples that are turned and multiplied at a time
  int64_t turned_floats;  // of the workspace, after the parts
  int64_t splits;
  int64_t tiles;    // blocks of a split
  int64_t results;  // elements of the output
  int64_t parts;    // of every result; with one, blocks write to the output itself

  bool is_direct() const { return kernel >= FisherKernel::depthwise; }
  bool is_pipelined() const { return kernel <= FisherKernel::half_block; }
  // Up to a boundary that turned elements may begin at.
  int64_t part_floats() const { return parts > 1 ? divide_up(parts * results, 64) * 64 : 0; }
  int64_t workspace_floats() const { return part_floats() + turned_floats; }
};

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
  task.padded_channels = args.channels;
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

}  // namespace tk
