// The indices of im2col: which element of x a column of the weight reads at a position of the
// output; the matrix itself is never written. Int is int32_t
// where all offsets inside an example fit it, else int64_t.
#pragma once

#include "cuda/conv2d_fisher/fisher_task.cuh"
#include "cuda/row_reduce.cuh"
#include "cuda/vector_load.cuh"

namespace tk {

template <class Int>
constexpr Int kOutside = Int{1} << (8 * sizeof(Int) - 2);  // of every image

// A channel at a tap.
template <class Int>
struct alignas(4 * sizeof(Int)) Column {
  Int offset;  // from the first channel of the pixel at tap (0, 0)
  Int h;       // and how far below and right of that pixel
  Int w;
  Int entry;  // of a filter's weights

  __device__ bool exists() const { return h != kOutside<Int>; }
};

// Columns are counted by channel, then tap, as weights are, or by tap, then channel.
template <bool kTapsFirst, class Int>
__device__ Column<Int> column_at(const FisherTask& task, Int index) {
  constexpr Column<Int> kNone = {0, kOutside<Int>, kOutside<Int>, 0};
  if (index >= task.tile_columns()) return kNone;
  const auto taps = static_cast<Int>(task.taps);
  const auto inner = kTapsFirst ? static_cast<Int>(task.padded_channels) : taps;
  const auto kernel_w = static_cast<Int>(task.kernel.w);
  const auto outer = static_cast<Int>(quotient(index, inner));
  const Int tap = kTapsFirst ? outer : index - outer * inner;
  const Int channel = kTapsFirst ? index - outer * inner : outer;
  if (kTapsFirst && channel >= task.channels) return kNone;
  const auto i = static_cast<Int>(quotient(tap, kernel_w));
  const Int h = i * static_cast<Int>(task.dilation.h);
  const Int w = (tap - i * kernel_w) * static_cast<Int>(task.dilation.w);
  const Int pixel = h * static_cast<Int>(task.image.w) + w;
  return {channel * static_cast<Int>(task.x.row) + pixel * static_cast<Int>(task.x.pixel), h, w,
          channel * taps + tap};
}

// The pixel at tap (0, 0) of an output position.
template <class Int>
struct Pixel {
  Int h;
  Int w;
  Int offset;

  Pixel() = default;
  __device__ Pixel(const FisherTask& task, Int position) {
    Int row;
    if constexpr (sizeof(Int) == 4) {
      const uint32_t high = __umulhi(position, task.by_out_width.magic);
      row = static_cast<Int>((high + position) >> task.by_out_width.shift);
    } else {
      row = quotient(position, task.out_image.w);
    }
    const Int column = position - row * static_cast<Int>(task.out_image.w);
    h = row * static_cast<Int>(task.stride.h) - static_cast<Int>(task.padding.h);
    w = column * static_cast<Int>(task.stride.w) - static_cast<Int>(task.padding.w);
    offset = (h * static_cast<Int>(task.image.w) + w) * static_cast<Int>(task.x.pixel);
    if (position >= static_cast<Int>(task.positions)) h = -kOutside<Int>;
  }

  __device__ bool inside(const FisherTask& task, const Column<Int>& column) const {
    using Unsigned = std::make_unsigned_t<Int>;
    return static_cast<Unsigned>(h + column.h) < static_cast<Unsigned>(task.image.h) &&
           static_cast<Unsigned>(w + column.w) < static_cast<Unsigned>(task.image.w);
  }
};

// The sum over a block of what its threads have, given to its first thread; `shared` has room for a
// number of each warp, and every thread is done with what was there.
__device__ inline float add_across_block(float value, float* shared) {
  float sums[1] = {value};
  add_across_lanes(sums, kWarp);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = sums[0];
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += shared[warp];
  return sum;
}

template <class E>
__device__ float load_weight(const FisherTask& task, int64_t at) {
  return task.weight_is_f32 ? load_element<Element<DType::f32>>(task.weight, at)
                            : load_element<E>(task.weight, at);
}

}  // namespace tk
