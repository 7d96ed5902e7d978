// The implicit-GEMM kernel, for wide groups: a block takes a tile of filters × columns, and of its
// examples one chunk of positions after the other. While a chunk is multiplied, the next one is on
// its way to registers; it goes to the other half of shared memory. Chunks follow each other across
// examples without a pause, however small an example is; one that ends inside a chunk is filled
// with zeros, so an example of one position costs as much as one of 32.
#pragma once

#include "cuda/conv2d_fisher/warp_mma.cuh"
#include "cuda/launch.cuh"

namespace tk {

template <class Product, class Tile>
struct TileMemory {
  using ChunkA = typename Product::template Chunk<Tile::kFilters>;
  using ChunkB = typename Product::template Chunk<Tile::kColumns>;
  static constexpr int kHalf = ChunkA::kBytes + ChunkB::kBytes;
  static constexpr int kColumns = 2 * kHalf;  // where the columns lie, then the buffers of Squares
  static constexpr int kBuffers = kColumns + Tile::kColumns * int{sizeof(Column<int>)};
  static constexpr int kSums = kLaneFilters * Tile::kLaneColumns;

  static DynamicShared shared(const FisherTask& task) {
    const int buffer = kThreads * kSums * int{sizeof(float)};
    return {kBuffers + task.buffers * buffer, kBuffers + kMaxBuffers * buffer};
  }
};

// Σ over examples of squared sums, in sums of sums where terms are many. The registers hold
//   short examples  squares; buffer 0 has those of the runs of examples before
//   spans           the sum of an example's spans; buffer 0 has the squares of the examples before,
//                   buffer 1 the first kSpans spans, and the next, of a very long example
// Buffers are shared memory, as many as the task says, one for each thread and sum.
template <class Memory, int kColumns>
class Squares {
  float values_[kLaneFilters][kColumns] = {};
  const bool spans_;
  const int buffers_;

  static __device__ float& buffer(int number, int i, int j) {
    auto* buffers = reinterpret_cast<float*>(dynamic_shared() + Memory::kBuffers);
    return buffers[((number * kLaneFilters + i) * kColumns + j) * kThreads + threadIdx.x];
  }

  template <class Each>
  static __device__ void for_each(const Each& each) {
#pragma unroll
    for (int i = 0; i < kLaneFilters; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) each(i, j);
    }
  }

  __device__ void move_to(int number) {
    for_each([&](int i, int j) {
      buffer(number, i, j) = __fadd_rn(buffer(number, i, j), values_[i][j]);
      values_[i][j] = 0;
    });
  }

  __device__ void take_from(int number) {
    for_each([&](int i, int j) {
      values_[i][j] = __fadd_rn(buffer(number, i, j), values_[i][j]);
      buffer(number, i, j) = 0;
    });
  }

 public:
  __device__ explicit Squares(const FisherTask& task) : spans_(task.spans), buffers_(task.buffers) {
    for (int number = 0; number < buffers_; ++number) {
      for_each([&](int i, int j) { buffer(number, i, j) = 0; });
    }
  }

  // Takes the sums of a span, or of a short example, and begins the next.
  __device__ void add(float (&sums)[kLaneFilters][kColumns]) {
    if (spans_) {
      for_each([&](int i, int j) { values_[i][j] = __fadd_rn(values_[i][j], sums[i][j]); });
    } else {
      for_each(
          [&](int i, int j) { values_[i][j] = __fmaf_rn(sums[i][j], sums[i][j], values_[i][j]); });
    }
    for_each([&](int i, int j) { sums[i][j] = 0; });
  }

  // After the add() that ended kSpans spans, but not the example.
  __device__ void end_spans() { move_to(1); }

  // After every add() that ended an example; `left` are to come.
  __device__ void end_example(int left) {
    if (spans_) {
      if (buffers_ > 1) take_from(1);
      for_each([&](int i, int j) {
        buffer(0, i, j) = __fmaf_rn(values_[i][j], values_[i][j], buffer(0, i, j));
        values_[i][j] = 0;
      });
    } else if (buffers_ > 0 && left % kRun == 0) {
      move_to(0);
    }
  }

  // The squares, once all examples have ended.
  __device__ const float (&get()) [kLaneFilters][kColumns] {
    if (buffers_ > 0) take_from(0);
    return values_;
  }
};

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
  place.columns = narrow(task.columns) - place.column;
  return place;
}

// The tile's filter and column of a lane's sum.
template <class Product, class Tile>
__device__ int filter_of(int i) {
  return static_cast<int>(threadIdx.x) / kWarp / Tile::kWarpsAcross * 32 + Product::row(i);
}

template <class Product, class Tile>
__device__ int column_of(int j) {
  return static_cast<int>(threadIdx.x) / kWarp % Tile::kWarpsAcross * Tile::kWarpColumns +
         Product::column(j);
}

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
  const char* stage_a = memory + warp / Tile::kWarpsAcross * 32 * ChunkA::kRowStep;
  const char* stage_b =
      memory + ChunkA::kBytes + warp % Tile::kWarpsAcross * Tile::kWarpColumns * ChunkB::kRowStep;
  float sums[kLaneFilters][Tile::kLaneColumns] = {};
  int begin = 0;  // of the chunk to fetch
  int half = 0;   // where the chunk before it is staged
  bool staged = false;
  while (true) {
    if (examples > 0) fetch(begin);
    if (staged) {
      Product::template multiply<ChunkA::kPitch, ChunkB::kPitch>(
          sums, stage_a + half * Memory::kHalf, stage_b + half * Memory::kHalf);
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
__device__ void write_squares(const FisherTask& task, const TilePlace& place,
                              const Column<int>* columns,
                              const float (&squares)[kLaneFilters][Tile::kLaneColumns]) {
  const int64_t filters = task.groups * task.filters;
  const int64_t first = place.split * filters + place.group * task.filters + place.filter;
  float* out = task.out + first * task.columns;
#pragma unroll
  for (int i = 0; i < kLaneFilters; ++i) {
    const int f = filter_of<Product, Tile>(i);
#pragma unroll
    for (int j = 0; j < Tile::kLaneColumns; ++j) {
      const int c = column_of<Product, Tile>(j);
      if (f < place.filters && c < place.columns) {
        out[f * task.columns + columns[c].entry] = squares[i][j];
      }
    }
  }
}

// Σ over the tile's columns of weight² · squares, for each of its filters.
template <class Product, class Tile>
__device__ void write_filters(const FisherTask& task, const TilePlace& place,
                              const Column<int>* columns,
                              const float (&squares)[kLaneFilters][Tile::kLaneColumns],
                              float* shared) {
  const int64_t first = place.group * task.filters + place.filter;
  float sums[kLaneFilters] = {};
#pragma unroll
  for (int i = 0; i < kLaneFilters; ++i) {
    const int f = filter_of<Product, Tile>(i);
#pragma unroll
    for (int j = 0; j < Tile::kLaneColumns; ++j) {
      const int c = column_of<Product, Tile>(j);
      if (f >= place.filters || c >= place.columns) continue;
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
    for (int i = 0; i < kLaneFilters; ++i) {
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
  task.out[part * task.groups * task.filters + first + f] = sum;
}

// Σ over the tile of the squares of one example; what lies beyond the last filter or column is
// zero.
template <class Tile>
__device__ void write_norm(const FisherTask& task, const TilePlace& place,
                           const float (&squares)[kLaneFilters][Tile::kLaneColumns],
                           float* shared) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kLaneFilters; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kLaneColumns; ++j) sum = __fadd_rn(sum, squares[i][j]);
  }
  __syncthreads();  // all warps have read the last chunk
  sum = add_across_block(sum, shared);
  const int64_t part = blockIdx.x - place.split * task.norm_parts;
  if (threadIdx.x == 0) task.out[part * task.batch + place.split] = sum;
}

template <class Product, class Tile>
__global__ void __launch_bounds__(kThreads, 2)
    fisher_gemm_kernel(const __grid_constant__ FisherTask task) {
  let_next_kernel_begin();
  using Memory = TileMemory<Product, Tile>;
  __shared__ TilePlace place;
  char* memory = dynamic_shared();
  auto* columns = reinterpret_cast<Column<int>*>(memory + Memory::kColumns);
  if (threadIdx.x == 0) place = place_of<Tile>(task, blockIdx.x);
  __syncthreads();
  if (threadIdx.x < Tile::kColumns) {
    columns[threadIdx.x] =
        column_at<Product::kChannelsInside, int>(task, place.column + threadIdx.x);
  }
  __syncthreads();

  Squares<Memory, Tile::kLaneColumns> squares(task);
  sum_examples<Product, Tile>(task, place, columns, memory, squares);
  if (task.norm_parts > 0) {
    write_norm<Tile>(task, place, squares.get(), reinterpret_cast<float*>(memory));
  } else if (task.weight) {
    write_filters<Product, Tile>(task, place, columns, squares.get(),
                                 reinterpret_cast<float*>(memory));
  } else {
    write_squares<Product, Tile>(task, place, columns, squares.get());
  }
}

}  // namespace tk
