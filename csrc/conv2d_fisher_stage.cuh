// How a chunk of positions of dy or x gets into shared memory, by way of registers: fetch_*()
// starts the loads, store() writes what has come; the products of another chunk run in between.
//
// A PositionsChunk has a row's positions side by side, in memory and in shared memory, and a
// ChannelsChunk a position's rows: filters of dy, columns of x. What lies beyond the last row, the
// last position of the example or the image is zero.
#pragma once

#include "conv2d_fisher_taps.cuh"

namespace tk {

// Bytes of a row that a chunk takes: 32 positions of half elements, 16 of floats.
constexpr int kRowBytes = 64;

template <class E>
constexpr int kChunk = kRowBytes / int{sizeof(typename E::Raw)};

// What fits 32 bits in every example that tiles are used for.
__device__ inline int narrow(int64_t value) { return static_cast<int>(value); }

// What both kinds of chunk keep in a thread: vectors of four words, or elements, which take a
// register each until they have all come.
template <class E, int kRows>
class Fetched {
 protected:
  using Raw = typename E::Raw;
  static constexpr int kSize = kVectorSize<E>;
  static constexpr int kPerWord = 4 / int{sizeof(Raw)};
  static constexpr int kElements = kRows * kChunk<E> / kThreads;
  static constexpr int kVectors = kElements < kSize ? 1 : kElements / kSize;

  uint32_t words_[kVectors * kSize];

  __device__ void load_vector(int i, const Raw* from, bool present) {
    uint4 loaded = {0, 0, 0, 0};
    if (present) loaded = __ldg(reinterpret_cast<const uint4*>(from));
    words_[4 * i] = loaded.x;
    words_[4 * i + 1] = loaded.y;
    words_[4 * i + 2] = loaded.z;
    words_[4 * i + 3] = loaded.w;
  }

  __device__ void load_element(int i, const Raw* from, bool present) {
    words_[i] = 0;
    if (present) words_[i] = __ldg(from);
  }

  template <class Product>
  __device__ uint32_t word(int i, bool vectors) const {
    if constexpr (kPerWord == 2) {
      if (!vectors) return words_[2 * i] | words_[2 * i + 1] << 16;
    }
    return Product::rounded(words_[i]);
  }

  template <class Product>
  __device__ void store_vector(char* to, int i, bool vectors) const {
    *reinterpret_cast<uint4*>(to) = {
        word<Product>(4 * i, vectors), word<Product>(4 * i + 1, vectors),
        word<Product>(4 * i + 2, vectors), word<Product>(4 * i + 3, vectors)};
  }
};

template <class E, int kRows>
class PositionsChunk : Fetched<E, kRows> {
  using Base = Fetched<E, kRows>;
  using Base::kElements;
  using Base::kPerWord;
  using Base::kSize;
  using Base::kVectors;
  using typename Base::Raw;
  static constexpr int kWords = kRowBytes / 4;  // of a row

 public:
  // The padding puts eight rows at one position into different banks.
  static constexpr int kPitch = kRowBytes + 16;
  static constexpr int kRowStep = kPitch;
  static constexpr int kBytes = kPitch * kRows;

  __device__ void fetch_dy(const FisherTask& task, const Raw* from, int rows, int begin) {
    fetch_matrix(task.dy, from, rows, begin, narrow(task.positions));
  }

  __device__ void fetch_x(const FisherTask& task, const Raw* from, const Column<int>* columns,
                          int rows, int begin) {
    if (task.is_matrix) {
      from += columns[0].offset;
      return fetch_matrix(task.x, from, rows, begin, narrow(task.positions));
    }
    const Pixel<int> first(task, begin + word_position());
    const Pixel<int> last(task, begin + word_position() + kPerWord - 1);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const Column<int> column = columns[word_row(i / kPerWord)];
      const Pixel<int>& pixel = i % kPerWord ? last : first;
      Base::load_element(i, from + pixel.offset + column.offset, pixel.inside(task, column));
    }
  }

  template <class Product>
  __device__ void store(char* stage, bool vectors) const {
    if (vectors) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (vector_row(i) >= kRows) break;
        char* to = stage + vector_row(i) * kPitch + vector_position() * int{sizeof(Raw)};
        Base::template store_vector<Product>(to, i, true);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kElements / kPerWord; ++i) {
        char* to = stage + word_row(i) * kPitch + word_position() * int{sizeof(Raw)};
        *reinterpret_cast<uint32_t*>(to) = Base::template word<Product>(i, false);
      }
    }
  }

 private:
  // Eight lanes take eight rows, whose banks differ, and four times eight the vectors of a row.
  static __device__ int vector_row(int i) {
    return i * (kThreads / 4) + static_cast<int>(threadIdx.x) / kWarp * 8 + threadIdx.x % 8;
  }
  static __device__ int vector_position() { return threadIdx.x % kWarp / 8 * kSize; }

  // 16 lanes take a row's words, and the other 16 those of the fourth row on: the other 16 banks.
  static __device__ int word_row(int i) {
    const int team = threadIdx.x / kWords;
    return i * (kThreads / kWords) + team / 8 * 8 + team % 2 * 4 + team / 2 % 4;
  }
  static __device__ int word_position() { return threadIdx.x % kWords * kPerWord; }

  __device__ void fetch_matrix(const FisherSide& side, const Raw* from, int rows, int begin,
                               int positions) {
    const auto row_step = narrow(side.row);
    if (side.vectors) {
      const int p = begin + vector_position();
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int row = vector_row(i);
        const bool present = row < kRows && row < rows && p < positions;
        Base::load_vector(i, from + row * row_step + p, present);
      }
    } else {
      const auto step = narrow(side.pixel);
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const int row = word_row(i / kPerWord);
        const int p = begin + word_position() + i % kPerWord;
        Base::load_element(i, from + row * row_step + p * step, row < rows && p < positions);
      }
    }
  }
};

template <class E, int kRows>
class ChannelsChunk : Fetched<E, kRows> {
  using Base = Fetched<E, kRows>;
  using Base::kSize;
  using Base::kVectors;
  using typename Base::Raw;
  static constexpr int kAcross = kRows / kSize;  // threads to a position

 public:
  // Padded by eight elements: of half type, eight positions of a row lie in different banks; of
  // floats, four positions of eight rows do.
  static constexpr int kPitch = (kRows + 8) * int{sizeof(Raw)};
  static constexpr int kRowStep = int{sizeof(Raw)};
  static constexpr int kBytes = kPitch * kChunk<E>;

  __device__ void fetch_dy(const FisherTask& task, const Raw* from, int rows, int begin) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int p = begin + position(i);
      const bool present = position(i) < kChunk<E> && p < narrow(task.positions);
      const Raw* at = from + p * narrow(task.dy.pixel) + row();
      if (task.dy.vectors) {
        Base::load_vector(i, at, present && row() < rows);
      } else {
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          Base::load_element(i * kSize + j, at + j, present && row() + j < rows);
        }
      }
    }
  }

  __device__ void fetch_x(const FisherTask& task, const Raw* from, const Column<int>* columns, int,
                          int begin) {
    Pixel<int> pixels[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const bool present = position(i) < kChunk<E>;
      pixels[i] = Pixel<int>(task, present ? begin + position(i) : narrow(task.positions));
    }
    if (task.x.vectors) {
      const Column<int> column = columns[row()];
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const Raw* at = from + pixels[i].offset + column.offset;
        Base::load_vector(i, at, pixels[i].inside(task, column));
      }
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const Column<int> column = columns[row() + j];
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          const Raw* at = from + pixels[i].offset + column.offset;
          Base::load_element(i * kSize + j, at, pixels[i].inside(task, column));
        }
      }
    }
  }

  template <class Product>
  __device__ void store(char* stage, bool vectors) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (position(i) >= kChunk<E>) break;
      char* to = stage + position(i) * kPitch + row() * int{sizeof(Raw)};
      Base::template store_vector<Product>(to, i, vectors);
    }
  }

 private:
  static __device__ int row() { return threadIdx.x % kAcross * kSize; }
  static __device__ int position(int i) { return i * (kThreads / kAcross) + threadIdx.x / kAcross; }
};

}  // namespace tk
