// The pipelined implicit-GEMM kernel, for wide groups on tensor cores: as implicit_gemm.cuh, but
// chunks of positions are copied to shared memory past the registers, into the stages of a ring, of
// which one is multiplied while the others fill. So the warps issue little but products, and their
// tiles may be larger: a warp's are 64 × 32.
#pragma once

#include "cuda/conv2d_fisher/copy_to_shared.cuh"
#include "cuda/conv2d_fisher/squares.cuh"
#include "cuda/conv2d_fisher/tile_results.cuh"
#include "cuda/launch.cuh"

namespace tk {

// In this order: columns, buffers of Squares, stages.
template <class Product, class Tile>
struct PipelineMemory {
  using E = typename Product::E;
  template <int kRows>
  using Copy =
      std::conditional_t<Product::kChannelsInside, ChannelsCopy<E, kRows>, PositionsCopy<E, kRows>>;
  using CopyA = Copy<Tile::kFilters>;
  using CopyB = Copy<Tile::kColumns>;
  static constexpr int kSums = Tile::kLaneFilters * Tile::kLaneColumns;
  static constexpr int kBuffer = kThreads * kSums * int{sizeof(float)};
  static constexpr int kBuffers = Tile::kColumns * int{sizeof(Column<int>)};
  static constexpr int kStage = CopyA::kBytes + CopyB::kBytes;
  static constexpr int kStages = kSums > 32 ? 4 : 3;  // fewer where a GPU has no room for them
  static constexpr int kFewest = 2;

  static int bytes(int buffers, int stages) {
    return kBuffers + buffers * kBuffer + stages * kStage;
  }

  // As many stages as a block may have shared memory for; sums do not depend on it.
  static int stages(const FisherTask& task, int limit) {
    int stages = kStages;
    while (stages > kFewest && bytes(task.buffers, stages) > limit) --stages;
    return stages;
  }

  static DynamicShared shared(const FisherTask& task, int limit) {
    const int buffers = kSums > 32 ? 1 : kMaxBuffers;  // the long examples get the smaller tile
    return {bytes(task.buffers, stages(task, limit)), std::min(limit, bytes(buffers, kStages))};
  }
};

// Chunks of the block's examples, one after the other, from global memory.
template <class Memory>
class Chunks {
  using E = typename Memory::E;
  using Raw = typename E::Raw;

  const FisherTask& task_;
  const TilePlace& place_;
  const Column<int>* columns_;
  const typename Memory::CopyA a_;
  const typename Memory::CopyB b_;
  const Raw* x_;
  const Raw* dy_;
  int examples_;  // to be fetched, the current one included
  int begin_ = 0;

 public:
  __device__ Chunks(const FisherTask& task, const TilePlace& place, const Column<int>* columns)
      : task_(task),
        place_(place),
        columns_(columns),
        a_(task.dy, nullptr),
        b_(task.x, columns),
        x_(static_cast<const Raw*>(task.x.data) + place.split * task.split * task.x.example +
           place.group * task.x.group),
        dy_(static_cast<const Raw*>(task.dy.data) + place.split * task.split * task.dy.example +
            place.group * task.dy.group + place.filter * task.dy.row),
        examples_(narrow(min(task.split, task.batch - place.split * task.split))) {}

  __device__ int examples() const { return examples_; }

  // Begins the copies of the next chunk, if there is one, and ends their group.
  __device__ void fetch(char* stage) {
    if (examples_ > 0) {
      a_.fetch_dy(task_, stage, dy_, place_.filters, begin_);
      b_.fetch_x(task_, stage + Memory::CopyA::kBytes, x_, columns_, place_.columns, begin_);
      begin_ += kChunk<E>;
      if (begin_ >= narrow(task_.positions)) {
        begin_ = 0;
        --examples_;
        x_ += task_.x.example;
        dy_ += task_.dy.example;
      }
    }
    end_copies();
  }
};

// Squares of all positions of the block's examples.
template <class Product, class Tile, class Sums>
__device__ void sum_pipelined(const FisherTask& task, const TilePlace& place,
                              const Column<int>* columns, char* ring, Sums& squares) {
  using Memory = PipelineMemory<Product, Tile>;
  const int end = task.stages * Memory::kStage;
  const int warp = threadIdx.x / kWarp;
  const typename Product::template Operand<typename Memory::CopyA, Tile::kWarpFilters, true>
      filters(warp / Tile::kWarpsAcross * Tile::kWarpFilters);
  const typename Product::template Operand<typename Memory::CopyB, Tile::kWarpColumns, false>
      warp_columns(warp % Tile::kWarpsAcross * Tile::kWarpColumns);

  Chunks<Memory> chunks(task, place, columns);
  int examples = chunks.examples();
  int to = 0;
  for (; to < end - Memory::kStage; to += Memory::kStage) chunks.fetch(ring + to);

  float sums[Tile::kLaneFilters][Tile::kLaneColumns] = {};
  int done = 0;  // positions of the example that have been multiplied
  int from = 0;
  while (true) {
    if (task.stages == Memory::kStages) {
      wait_for_copies<Memory::kStages - 2>();
    } else if (Memory::kStages > 3 && task.stages == 3) {
      wait_for_copies<1>();
    } else {
      wait_for_copies<Memory::kFewest - 2>();
    }
    // All have seen their copies of this stage land, and have multiplied the one that is filled
    // next.
    __syncthreads();
    chunks.fetch(ring + to);
    const char* stage = ring + from;
    Product::multiply(sums, filters, stage, warp_columns, stage + Memory::CopyA::kBytes);
    to = from;
    from += Memory::kStage;
    if (from == end) from = 0;

    done += kChunk<typename Product::E>;
    const bool ended = done >= narrow(task.positions);
    if (ended || done % Product::kSpan == 0) squares.add(sums);
    if (ended) {
      done = 0;
      squares.end_example(--examples);
      if (examples == 0) break;
    } else if (done % (Product::kSpan * kSpans) == 0) {
      squares.end_spans();
    }
  }
}

template <class Product, class Tile>
__global__ void __launch_bounds__(kThreads, Tile::kLaneFilters > 4 ? 1 : 2)
    fisher_pipelined_kernel(const __grid_constant__ FisherTask task) {
  let_next_kernel_begin();
  using Memory = PipelineMemory<Product, Tile>;
  char* memory = dynamic_shared();
  auto* columns = reinterpret_cast<Column<int>*>(memory);
  char* ring = memory + Memory::kBuffers + task.buffers * Memory::kBuffer;
  const TilePlace& place = find_tile<Product, Tile>(task, columns);

  Squares<Memory, Tile> squares(task);
  sum_pipelined<Product, Tile>(task, place, columns, ring, squares);
  write_results<Product, Tile, true>(task, place, columns, squares.get(),
                                     reinterpret_cast<float*>(ring));
}

}  // namespace tk
