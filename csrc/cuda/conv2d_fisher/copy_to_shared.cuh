// How a chunk of positions of dy or x gets into a stage of shared memory past the registers:
// fetch_*() begins copies of 16 or 4 bytes, which land while other stages are multiplied. What lies
// beyond the last row, the last position of the example or the image is filled with zeros.
//
// The chunks are those of global_to_shared.cuh, with no room between their rows: a row's vectors of
// 16 bytes are swapped among themselves, so that those which a warp reads at once lie in different
// banks.
#pragma once

#include "cuda/conv2d_fisher/global_to_shared.cuh"
#include "cuda/ptx.cuh"

namespace tk {

// Positions side by side, where x is a matrix.
template <class E, int kRows>
class PositionsCopy {
  using Raw = typename E::Raw;

 public:
  static constexpr int kBytes = kRowBytes * kRows;
  static constexpr bool kRounded = false;

  // The byte where a row's 16 bytes begin that are the vector-th.
  static __device__ int at(int row, int vector) {
    return row * kRowBytes + (vector ^ (row >> 1 & 3)) * 16;
  }

  __device__ PositionsCopy(const FisherSide&, const Column<int>*) {}

  __device__ void fetch_dy(const FisherTask& task, char* stage, const Raw* from, int rows,
                           int begin) const {
    fetch(task.dy, stage, from, rows, begin, narrow(task.positions));
  }

  __device__ void fetch_x(const FisherTask& task, char* stage, const Raw* from,
                          const Column<int>* columns, int rows, int begin) const {
    fetch(task.x, stage, from + columns[0].offset, rows, begin, narrow(task.positions));
  }

 private:
  static __device__ void fetch(const FisherSide& side, char* stage, const Raw* from, int rows,
                               int begin, int positions) {
    if (side.bytes == 16) {
      fetch_as<16>(side, stage, from, rows, begin, positions);
    } else {
      fetch_as<4>(side, stage, from, rows, begin, positions);
    }
  }

  template <int kSize>
  static __device__ void fetch_as(const FisherSide& side, char* stage, const Raw* from, int rows,
                                  int begin, int positions) {
    constexpr int kAlong = kRowBytes / kSize;  // threads that share a row
    constexpr int kDown = kThreads / kAlong;
    const int along = threadIdx.x % kAlong;
    const int p = begin + along * (kSize / int{sizeof(Raw)});
#pragma unroll
    for (int i = 0; i < kRows / kDown; ++i) {
      const int row = i * kDown + static_cast<int>(threadIdx.x) / kAlong;
      char* to = stage + at(row, along * kSize / 16) + along * kSize % 16;
      copy_to_shared<kSize>(to, from + (row * narrow(side.row) + p), row < rows && p < positions);
    }
  }
};

// Rows, filters or channels, side by side.
template <class E, int kRows>
class ChannelsCopy {
  using Raw = typename E::Raw;
  static constexpr int kElement = sizeof(Raw);
  static constexpr int kVector = 16 / kElement;

  Column<int> column_;  // of x, that the thread's copies begin with
  int to_;              // where the first of its copies of 16 bytes goes

  template <int kSize>
  static constexpr int kAcross = kRows * kElement / kSize;  // threads that share a position

  template <int kSize>
  static __device__ int row() {
    return threadIdx.x % kAcross<kSize> * (kSize / kElement);
  }

 public:
  static constexpr int kBytes = kRows * kElement * kChunk<E>;
  static constexpr bool kRounded = false;

  // The byte of a row at a position. Read at once are a vector at eight positions, or, of floats,
  // two vectors at four.
  static __device__ int at(int row, int position) {
    const int swap = kElement == 2 ? position & 7 : (position & 3) * 2;
    const int vector = row / kVector;
    return position * kRows * kElement + (vector ^ swap) * 16 + (row - vector * kVector) * kElement;
  }

  __device__ ChannelsCopy(const FisherSide& side, const Column<int>* columns) {
    if (columns) column_ = columns[side.bytes == 16 ? row<16>() : row<4>()];
    to_ = at(row<16>(), static_cast<int>(threadIdx.x) / kAcross<16>);
    keep(to_);
  }

  __device__ void fetch_dy(const FisherTask& task, char* stage, const Raw* from, int rows,
                           int begin) const {
    if (task.dy.bytes == 16) {
      fetch_filters<16>(task, stage, from, rows, begin);
    } else {
      fetch_filters<4>(task, stage, from, rows, begin);
    }
  }

  __device__ void fetch_x(const FisherTask& task, char* stage, const Raw* from, const Column<int>*,
                          int, int begin) const {
    if (task.x.bytes == 16) {
      fetch_columns<16>(task, stage, from, begin);
    } else {
      fetch_columns<4>(task, stage, from, begin);
    }
  }

 private:
  template <int kSize, class Each>
  __device__ void for_each_position(const Each& each) const {
    constexpr int kDown = kThreads / kAcross<kSize>;
#pragma unroll
    for (int i = 0; i < kChunk<E> / kDown; ++i) {
      const int position = i * kDown + static_cast<int>(threadIdx.x) / kAcross<kSize>;
      if constexpr (kSize == 16) {
        static_assert(kDown % 8 == 0);  // so that vectors are swapped alike
        each(position, to_ + at(0, i * kDown));
      } else {
        each(position, at(row<kSize>(), position));
      }
    }
  }

  template <int kSize>
  __device__ void fetch_filters(const FisherTask& task, char* stage, const Raw* from, int rows,
                                int begin) const {
    for_each_position<kSize>([&](int position, int to) {
      const int p = begin + position;
      copy_to_shared<kSize>(stage + to, from + (p * narrow(task.dy.pixel) + row<kSize>()),
                            row<kSize>() < rows && p < narrow(task.positions));
    });
  }

  template <int kSize>
  __device__ void fetch_columns(const FisherTask& task, char* stage, const Raw* from,
                                int begin) const {
    for_each_position<kSize>([&](int position, int to) {
      const Pixel<int> pixel(task, begin + position);
      copy_to_shared<kSize>(stage + to, from + (pixel.offset + column_.offset),
                            pixel.inside(task, column_));
    });
  }
};

}  // namespace tk
