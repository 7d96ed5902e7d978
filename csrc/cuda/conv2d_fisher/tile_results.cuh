// Where the tile of a block lies, and how what it has summed is written.
#pragma once

#include "cuda/conv2d_fisher/warp_mma.cuh"

namespace tk {

// Where a block's tile lies. Shared memory keeps it: it is needed before and after the loop over
// the positions, which has no register to spare.
struct TilePlace {
  int64_t split;
  int64_t group;
  int32_t filter;  // the tile's first of the group
  int32_t column;
  int32_t filters;  // from there to the last of the group
  int32_t columns;
};

template <class Tile>
__device__ TilePlace place_of(const FisherTask& task, uint32_t block) {
  const uint32_t tiles = block / task.column_tiles;
  const uint32_t groups = tiles / task.filter_tiles;
  const uint32_t split = groups / static_cast<uint32_t>(task.groups);
  TilePlace place;
  place.split = split;
  place.group = groups - split * static_cast<uint32_t>(task.groups);
  place.filter = static_cast<int>(tiles - groups * task.filter_tiles) * Tile::kFilters;
  place.column = static_cast<int>(block - tiles * task.column_tiles) * Tile::kColumns;
  place.filters = narrow(task.filters) - place.filter;
  place.columns = narrow(task.tile_columns()) - place.column;
  return place;
}

// The block's tile, and where its columns are read: there for all threads once this returns.
template <class Product, class Tile>
__device__ const TilePlace& find_tile(const FisherTask& task, Column<int>* columns) {
  __shared__ TilePlace place;
  if (threadIdx.x == 0) place = place_of<Tile>(task, blockIdx.x);
  __syncthreads();
  if (threadIdx.x < Tile::kColumns) {
    columns[threadIdx.x] =
        column_at<Product::kChannelsInside, int>(task, place.column + threadIdx.x);
  }
  __syncthreads();
  return place;
}

// The tile's filter and column of a lane's sum.
template <class Product, class Tile>
__device__ int filter_of(int i) {
  return static_cast<int>(threadIdx.x) / kWarp / Tile::kWarpsAcross * Tile::kWarpFilters +
         Product::row(i);
}

template <class Product, class Tile>
__device__ int column_of(int j) {
  return static_cast<int>(threadIdx.x) / kWarp % Tile::kWarpsAcross * Tile::kWarpColumns +
         Product::column(j);
}

// What kAdds writes is added to what is there, if the task says so.
template <class Product, class Tile, bool kAdds>
__device__ void write_squares(const FisherTask& task, const TilePlace& place,
                              const Column<int>* columns,
                              const float (&squares)[Tile::kLaneFilters][Tile::kLaneColumns]) {
  const int64_t filters = task.groups * task.filters;
  const int64_t first = place.split * filters + place.group * task.filters + place.filter;
  float* out = task.out + first * task.columns;
#pragma unroll
  for (int i = 0; i < Tile::kLaneFilters; ++i) {
    const int f = filter_of<Product, Tile>(i);
#pragma unroll
    for (int j = 0; j < Tile::kLaneColumns; ++j) {
      const int c = column_of<Product, Tile>(j);
      if (f < place.filters && columns[c].exists()) {
        float& to = out[f * task.columns + columns[c].entry];
        to = kAdds && task.adds ? __fadd_rn(to, squares[i][j]) : squares[i][j];
      }
    }
  }
}

// Σ over the tile's columns of weight² · squares, for each of its filters.
template <class Product, class Tile, bool kAdds>
__device__ void write_filters(const FisherTask& task, const TilePlace& place,
                              const Column<int>* columns,
                              const float (&squares)[Tile::kLaneFilters][Tile::kLaneColumns],
                              float* shared) {
  const int64_t first = place.group * task.filters + place.filter;
  float sums[Tile::kLaneFilters] = {};
#pragma unroll
  for (int i = 0; i < Tile::kLaneFilters; ++i) {
    const int f = filter_of<Product, Tile>(i);
#pragma unroll
    for (int j = 0; j < Tile::kLaneColumns; ++j) {
      const int c = column_of<Product, Tile>(j);
      if (f >= place.filters || !columns[c].exists()) continue;
      const int64_t at = (first + f) * task.columns + columns[c].entry;
      const float w = load_weight<typename Product::E>(task, at);
      sums[i] = __fmaf_rn(__fmul_rn(w, w), squares[i][j], sums[i]);
    }
  }
  add_across_lanes(sums, 4);  // those that share the filters
  __syncthreads();            // all warps have read the last chunk
  if (lane() % 4 == 0) {
    const int across = threadIdx.x / kWarp % Tile::kWarpsAcross;
#pragma unroll
    for (int i = 0; i < Tile::kLaneFilters; ++i) {
      shared[filter_of<Product, Tile>(i) * Tile::kWarpsAcross + across] = sums[i];
    }
  }
  __syncthreads();
  const auto f = static_cast<int>(threadIdx.x);
  if (f >= min(place.filters, Tile::kFilters)) return;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < Tile::kWarpsAcross; ++i) sum += shared[f * Tile::kWarpsAcross + i];
  const int64_t part = place.split * task.column_tiles + place.column / Tile::kColumns;
  float& to = task.out[part * task.groups * task.filters + first + f];
  to = kAdds && task.adds ? __fadd_rn(to, sum) : sum;
}

// Σ over the tile of the squares of one example; what lies beyond the last filter or column is
// zero.
template <class Tile>
__device__ void write_norm(const FisherTask& task, const TilePlace& place,
                           const float (&squares)[Tile::kLaneFilters][Tile::kLaneColumns],
                           float* shared) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < Tile::kLaneFilters; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kLaneColumns; ++j) sum = __fadd_rn(sum, squares[i][j]);
  }
  __syncthreads();  // all warps have read the last chunk
  sum = add_across_block(sum, shared);
  const int64_t part = blockIdx.x - place.split * task.norm_parts;
  if (threadIdx.x == 0) task.out[part * task.batch + place.split] = sum;
}

// What the call asks for; `shared` has room for what warps add up, and all of them come here.
template <class Product, class Tile, bool kAdds>
__device__ void write_results(const FisherTask& task, const TilePlace& place,
                              const Column<int>* columns,
                              const float (&squares)[Tile::kLaneFilters][Tile::kLaneColumns],
                              float* shared) {
  if (task.norm_parts > 0) {
    write_norm<Tile>(task, place, squares, shared);
  } else if (task.weight) {
    write_filters<Product, Tile, kAdds>(task, place, columns, squares, shared);
  } else {
    write_squares<Product, Tile, kAdds>(task, place, columns, squares);
  }
}

}  // namespace tk
