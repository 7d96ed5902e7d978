// The implicit-GEMM kernel, for wide groups: a block takes a tile of filters × columns, and of its
// examples one chunk of positions after the other. While a chunk is multiplied, the next one is on
// its way to registers; it goes to the other half of shared memory. Chunks follow each other across
// examples without a pause, however small an example is; one that ends inside a chunk is filled
// with zeros, so an example of one position costs as much as one of 32.
#pragma once

#include "cuda/conv2d_fisher/squares.cuh"
#include "cuda/conv2d_fisher/tile_results.cuh"
#include "cuda/launch.cuh"

namespace tk {

template <class Product, class Tile>
struct TileMemory {
  using ChunkA = typename Product::template Chunk<Tile::kFilters>;
  using ChunkB = typename Product::template Chunk<Tile::kColumns>;
  static constexpr int kHalf = ChunkA::kBytes + ChunkB::kBytes;
  static constexpr int kColumns = 2 * kHalf;  // where the columns lie, then the buffers of Squares
  static constexpr int kBuffers = kColumns + Tile::kColumns * int{sizeof(Column<int>)};
  static constexpr int kSums = Tile::kLaneFilters * Tile::kLaneColumns;

  static DynamicShared shared(const FisherTask& task) {
    const int buffer = kThreads * kSums * int{sizeof(float)};
    return {kBuffers + task.buffers * buffer, kBuffers + kMaxBuffers * buffer};
  }
};

// Squares of all positions of the block's examples.
template <class Product, class Tile, class Sums>
__device__ void sum_examples(const FisherTask& task, const TilePlace& place,
                             const Column<int>* columns, char* memory, Sums& squares) {
  using E = typename Product::E;
  using Raw = typename E::Raw;
  using Memory = TileMemory<Product, Tile>;
  using ChunkA = typename Memory::ChunkA;
  using ChunkB = typename Memory::ChunkB;

  const int64_t first = place.split * task.split;
  const auto* x =
      static_cast<const Raw*>(task.x.data) + first * task.x.example + place.group * task.x.group;
  const auto* dy = static_cast<const Raw*>(task.dy.data) + first * task.dy.example +
                   place.group * task.dy.group + place.filter * task.dy.row;
  int examples = narrow(min(task.split, task.batch - first));

  ChunkA a;
  ChunkB b;
  const auto fetch = [&](int begin) {
    a.fetch_dy(task, dy, place.filters, begin);
    b.fetch_x(task, x, columns, place.columns, begin);
  };
  const auto store = [&](int half) {
    char* to = memory + half * Memory::kHalf;
    a.template store<Product>(to, task.dy.bytes);
    b.template store<Product>(to + ChunkA::kBytes, task.x.bytes);
  };

  const int warp = threadIdx.x / kWarp;
  const typename Product::template Operand<ChunkA, Tile::kWarpFilters, true> filters(
      warp / Tile::kWarpsAcross * Tile::kWarpFilters);
  const typename Product::template Operand<ChunkB, Tile::kWarpColumns, false> warp_columns(
      warp % Tile::kWarpsAcross * Tile::kWarpColumns);
  float sums[Tile::kLaneFilters][Tile::kLaneColumns] = {};
  int begin = 0;  // of the chunk to fetch
  int half = 0;   // where the chunk before it is staged
  bool staged = false;
  while (true) {
    if (examples > 0) fetch(begin);
    if (staged) {
      const char* from = memory + half * Memory::kHalf;
      Product::multiply(sums, filters, from, warp_columns, from + ChunkA::kBytes);
      if (begin % Product::kSpan == 0) squares.add(sums);
      if (begin == 0) {
        squares.end_example(examples);
      } else if (begin % (Product::kSpan * kSpans) == 0) {
        squares.end_spans();
      }
      if (examples == 0) break;
    }
    half ^= 1;
    store(half);
    __syncthreads();
    staged = true;
    begin += kChunk<E>;
    if (begin >= narrow(task.positions)) {
      begin = 0;
      --examples;
      x += task.x.example;
      dy += task.dy.example;
    }
  }
}

template <class Product, class Tile>
__global__ void __launch_bounds__(kThreads, 2)
    fisher_gemm_kernel(const __grid_constant__ FisherTask task) {
  let_next_kernel_begin();
  using Memory = TileMemory<Product, Tile>;
  char* memory = dynamic_shared();
  auto* columns = reinterpret_cast<Column<int>*>(memory + Memory::kColumns);
  const TilePlace& place = find_tile<Product, Tile>(task, columns);

  Squares<Memory, Tile> squares(task);
  sum_examples<Product, Tile>(task, place, columns, memory, squares);
  write_results<Product, Tile, false>(task, place, columns, squares.get(),
                                      reinterpret_cast<float*>(memory));
}

}  // namespace tk
