// The direct kernel, for small groups of the convolution: a group of lanes takes kFilters ×
// kColumns of the weight and shares the positions of an example. A lane adds up its positions,
// shuffles add up the lanes and shared memory the warps; every lane then knows the sums, and keeps
// their squares.
#pragma once

#include "cuda/conv2d_fisher/im2col.cuh"
#include "cuda/ptx.cuh"

namespace tk {

// What a thread works on: it is lane `lane` of the `lanes` of its lane group, which may span
// several warps. The next lane of a warp is the next of the lane group, or the first of the next
// one, which takes the next group of the convolution.
template <int kFilters, int kColumns>
struct LaneGroup {
  int lane;
  int lanes;
  int64_t split;
  int64_t group;
  int64_t filter;  // the first, of the group
  int64_t column;
  int64_t column_tile;
  bool present;

  __device__ explicit LaneGroup(const FisherTask& task) {
    const int warp = threadIdx.x / kWarp;
    const int warps_mask = (1 << task.warps_log2) - 1;
    const int lanes_mask = (1 << task.lanes_log2) - 1;
    const int warp_units = kWarp >> task.lanes_log2;
    lane = ((warp & warps_mask) << task.lanes_log2) + (threadIdx.x & lanes_mask);
    lanes = 1 << task.lanes_log2 << task.warps_log2;

    // A unit is what a lane group takes.
    const int64_t units = task.groups * task.filter_tiles * task.column_tiles;
    const int64_t block_units = kThreads / lanes;
    const int64_t blocks = divide_up(units, block_units);
    split = quotient(blockIdx.x, blocks);
    const int64_t unit = (blockIdx.x - split * blocks) * block_units +
                         (warp >> task.warps_log2) * warp_units +
                         (threadIdx.x % kWarp >> task.lanes_log2);
    const int64_t tile = quotient(unit, task.groups);
    group = unit - tile * task.groups;
    column_tile = quotient(tile, task.filter_tiles);
    filter = (tile - column_tile * task.filter_tiles) * kFilters;
    column = column_tile * kColumns;
    present = unit < units;
  }
};

// Adds up what the lanes of a lane group have. The caller alternates between two buffers, so that
// one barrier is enough.
template <int kSums>
__device__ void add_across_group(const FisherTask& task, float (&sums)[kSums],
                                 float (&buffer)[kThreads * kSums]) {
  const int lanes = 1 << task.lanes_log2;
  const int warps = 1 << task.warps_log2;
  add_across_lanes(sums, lanes);
  if (warps == 1) return;
  const int warp = threadIdx.x / kWarp;
  const int pitch = (kWarp >> task.lanes_log2) * kSums;
  float* warp_sums = buffer + (threadIdx.x % kWarp >> task.lanes_log2) * kSums;
  if ((threadIdx.x & (lanes - 1)) == 0) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) warp_sums[warp * pitch + i] = sums[i];
  }
  __syncthreads();
  warp_sums += (warp & -warps) * pitch;
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] = warp_sums[i];
  for (int j = 1; j < warps; ++j) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] += warp_sums[j * pitch + i];
  }
}

template <class E, int kFilters, int kColumns, class Int>
__global__ void __launch_bounds__(kThreads, sizeof(Int) == 4 ? 2 : 1)
    fisher_direct_kernel(const __grid_constant__ FisherTask task) {
  let_next_kernel_begin();
  using Raw = typename E::Raw;
  constexpr int kSums = kFilters * kColumns;
  __shared__ float buffers[2][kThreads * kSums];

  const LaneGroup<kFilters, kColumns> lanes(task);
  Column<Int> columns[kColumns];
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    columns[j] = column_at<false>(task, static_cast<Int>(lanes.column + j));
  }
  const int64_t first = lanes.split * task.split;
  const auto* x =
      static_cast<const Raw*>(task.x.data) + first * task.x.example + lanes.group * task.x.group;
  const auto* dy = static_cast<const Raw*>(task.dy.data) + first * task.dy.example +
                   lanes.group * task.dy.group + lanes.filter * task.dy.row;
  const auto row_step = static_cast<Int>(task.dy.row);
  const auto pixel_step = static_cast<Int>(task.dy.pixel);
  const auto filters = static_cast<Int>(task.filters - lanes.filter);
  const auto positions = static_cast<Int>(lanes.present ? task.positions : 0);
  const auto span = static_cast<Int>(kSpan) * lanes.lanes;

  float squares[kSums] = {};
  int64_t examples = min(task.split, task.batch - first);
#pragma unroll 1
  for (int buffer = 0; examples > 0; --examples, buffer ^= 1) {
    float sums[kSums] = {};
#pragma unroll 1
    for (Int begin = lanes.lane; begin < positions; begin += span) {
      const Int end = positions - begin < span ? positions : begin + span;
      float parts[kSums] = {};
#pragma unroll 1
      for (Int p = begin; p < end; p += lanes.lanes) {
        float factors[kFilters];
#pragma unroll
        for (int i = 0; i < kFilters; ++i) {
          const Int offset = p * pixel_step + i * row_step;
          factors[i] = i < filters ? E::widen(__ldg(dy + offset)) : 0;
        }
        const Pixel<Int> pixel(task, p);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const Raw* at = x + pixel.offset + columns[j].offset;
          const float value = pixel.inside(task, columns[j]) ? E::widen(__ldg(at)) : 0;
#pragma unroll
          for (int i = 0; i < kFilters; ++i) {
            parts[i * kColumns + j] = __fmaf_rn(factors[i], value, parts[i * kColumns + j]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] = __fadd_rn(sums[i], parts[i]);
    }
    add_across_group(task, sums, buffers[buffer]);
#pragma unroll
    for (int i = 0; i < kSums; ++i) squares[i] = __fmaf_rn(sums[i], sums[i], squares[i]);
    x += task.x.example;
    dy += task.dy.example;
  }
  if (task.norm_parts > 0) {
    float sum = 0;
    if (lanes.lane == 0) {  // what lies beyond the last filter or column is zero
#pragma unroll
      for (int i = 0; i < kSums; ++i) sum = __fadd_rn(sum, squares[i]);
    }
    __syncthreads();
    sum = add_across_block(sum, buffers[0]);
    const int64_t part = blockIdx.x - lanes.split * task.norm_parts;
    if (threadIdx.x == 0) task.out[part * task.batch + lanes.split] = sum;
    return;
  }
  if (lanes.lane != 0 || !lanes.present) return;

  const int64_t all_filters = task.groups * task.filters;
  const int64_t filter = lanes.group * task.filters + lanes.filter;
#pragma unroll
  for (int i = 0; i < kFilters; ++i) {
    if (i >= filters) break;
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (lanes.column + j >= task.columns) break;
      const int64_t at = (filter + i) * task.columns + lanes.column + j;
      if (task.weight) {
        const float w = load_weight<E>(task, at);
        sum = __fmaf_rn(__fmul_rn(w, w), squares[i * kColumns + j], sum);
      } else {
        task.out[lanes.split * all_filters * task.columns + at] = squares[i * kColumns + j];
      }
    }
    if (task.weight) {
      const int64_t part = lanes.split * task.column_tiles + lanes.column_tile;
      task.out[part * all_filters + filter + i] = sum;
    }
  }
}

}  // namespace tk
