// The kernel of small groups: a team of lanes takes kFilters × kColumns of a group, and its lanes
// share the positions of an example. A lane adds up its positions, shuffles add up the lanes and
// shared memory the warps of a team; every lane then knows the sums, and keeps their squares.
#pragma once

#include "cuda/conv2d_fisher/taps.cuh"

namespace tk {

// What a thread works on: lane `lane` of the `lanes` of its team, which may span several warps. A
// warp's next lane is the team's next, or the first of the next team, of the next group.
template <int kFilters, int kColumns>
struct Team {
  int lane;
  int lanes;
  int64_t split;
  int64_t group;
  int64_t filter;  // the first, of the group
  int64_t column;
  int64_t column_tile;
  bool present;

  __device__ explicit Team(const FisherTask& task) {
    const int warp = threadIdx.x / kWarp;
    const int warps_mask = (1 << task.warps_log2) - 1;
    const int lanes_mask = (1 << task.lanes_log2) - 1;
    const int teams_of_warp = kWarp >> task.lanes_log2;
    lane = ((warp & warps_mask) << task.lanes_log2) + (threadIdx.x & lanes_mask);
    lanes = 1 << task.lanes_log2 << task.warps_log2;

    const int64_t units = task.groups * task.filter_tiles * task.column_tiles;
    const int64_t teams = kThreads / lanes;  // of a block
    const int64_t blocks = divide_up(units, teams);
    split = quotient(blockIdx.x, blocks);
    const int64_t unit = (blockIdx.x - split * blocks) * teams +
                         (warp >> task.warps_log2) * teams_of_warp +
                         (threadIdx.x % kWarp >> task.lanes_log2);
    const int64_t tile = quotient(unit, task.groups);
    group = unit - tile * task.groups;
    column_tile = quotient(tile, task.filter_tiles);
    filter = (tile - column_tile * task.filter_tiles) * kFilters;
    column = column_tile * kColumns;
    present = unit < units;
  }
};

// Adds up what the lanes of a team have. Two rooms of shared memory take turns, so that one
// barrier is enough.
template <int kSums>
__device__ void add_across_team(const FisherTask& task, float (&sums)[kSums],
                                float (&room)[kThreads * kSums]) {
  const int lanes = 1 << task.lanes_log2;
  const int warps = 1 << task.warps_log2;
  add_across_lanes(sums, lanes);
  if (warps == 1) return;
  const int warp = threadIdx.x / kWarp;
  const int pitch = (kWarp >> task.lanes_log2) * kSums;
  float* warp_sums = room + (threadIdx.x % kWarp >> task.lanes_log2) * kSums;
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
    fisher_team_kernel(const __grid_constant__ FisherTask task) {
  using Raw = typename E::Raw;
  constexpr int kSums = kFilters * kColumns;
  __shared__ float rooms[2][kThreads * kSums];

  const Team<kFilters, kColumns> team(task);
  Column<Int> columns[kColumns];
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    columns[j] = column_at<false>(task, static_cast<Int>(team.column + j));
  }
  const int64_t first = team.split * task.split;
  const auto* x =
      static_cast<const Raw*>(task.x.data) + first * task.x.example + team.group * task.x.group;
  const auto* dy = static_cast<const Raw*>(task.dy.data) + first * task.dy.example +
                   team.group * task.dy.group + team.filter * task.dy.row;
  const auto row_step = static_cast<Int>(task.dy.row);
  const auto pixel_step = static_cast<Int>(task.dy.pixel);
  const auto filters = static_cast<Int>(task.filters - team.filter);
  const auto positions = static_cast<Int>(team.present ? task.positions : 0);
  const auto span = static_cast<Int>(kSpan) * team.lanes;

  float squares[kSums] = {};
  int64_t examples = min(task.split, task.batch - first);
#pragma unroll 1
  for (int room = 0; examples > 0; --examples, room ^= 1) {
    float sums[kSums] = {};
#pragma unroll 1
    for (Int begin = team.lane; begin < positions; begin += span) {
      const Int end = positions - begin < span ? positions : begin + span;
      float parts[kSums] = {};
#pragma unroll 1
      for (Int p = begin; p < end; p += team.lanes) {
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
    add_across_team(task, sums, rooms[room]);
#pragma unroll
    for (int i = 0; i < kSums; ++i) squares[i] = __fmaf_rn(sums[i], sums[i], squares[i]);
    x += task.x.example;
    dy += task.dy.example;
  }
  if (team.lane != 0 || !team.present) return;

  const int64_t all_filters = task.groups * task.filters;
  const int64_t filter = team.group * task.filters + team.filter;
#pragma unroll
  for (int i = 0; i < kFilters; ++i) {
    if (i >= filters) break;
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (team.column + j >= task.columns) break;
      const int64_t at = (filter + i) * task.columns + team.column + j;
      if (task.weight) {
        const float w = load_weight<E>(task, at);
        sum = __fmaf_rn(__fmul_rn(w, w), squares[i * kColumns + j], sum);
      } else {
        task.out[team.split * all_filters * task.columns + at] = squares[i * kColumns + j];
      }
    }
    if (task.weight) {
      const int64_t part = team.split * task.column_tiles + team.column_tile;
      task.out[part * all_filters + filter + i] = sum;
    }
  }
}

}  // namespace tk
