// How a chunk of positions of dy or x gets into shared memory, by way of registers: fetch_*()
// starts the loads, store() writes what has come; the products of another chunk run in between.
//
// A PositionsChunk has a row's positions side by side, in memory and in shared memory, and a
// ChannelsChunk a position's rows: filters of dy, columns of x. What lies beyond the last row, the
// last position of the example or the image is zero.
#pragma once

#include "cuda/conv2d_fisher/im2col.cuh"

namespace tk {

// Bytes of a row that a chunk takes: 32 positions of half elements, 16 of floats.
constexpr int kRowBytes = 64;

template <class E>
constexpr int kChunk = kRowBytes / int{sizeof(typename E::Raw)};

// What fits 32 bits in every example that tiles are used for.
__device__ inline int narrow(int64_t value) { return static_cast<int>(value); }

// What both kinds of chunk keep in a thread: 16-byte vectors, or words, or the halves of words,
// which take a register each until they have all come.
template <class E, int kRows>
class Fetched {
 protected:
  using Raw = typename E::Raw;
  static constexpr int kSize = kVectorSize<E>;
  static constexpr int kPerWord = 4 / int{sizeof(Raw)};
  static constexpr int kWords = kRows * kRowBytes / 4 / kThreads;
  static constexpr int kVectors = kWords < 4 ? 1 : kWords / 4;

  uint32_t loaded_[kVectors * kSize];

  // The i-th kCount elements of the thread: a vector, a word or one.
  template <int kCount>
  __device__ void load(int i, const Raw* from, bool present) {
    if constexpr (kCount == kSize) {
      uint4 vector = {0, 0, 0, 0};
      if (present) vector = __ldg(reinterpret_cast<const uint4*>(from));
      loaded_[4 * i] = vector.x;
      loaded_[4 * i + 1] = vector.y;
      loaded_[4 * i + 2] = vector.z;
      loaded_[4 * i + 3] = vector.w;
    } else {
      using Type = std::conditional_t<kCount == 1, Raw, uint32_t>;
      loaded_[i] = 0;
      if (present) loaded_[i] = __ldg(reinterpret_cast<const Type*>(from));
    }
  }

  template <class Product>
  __device__ uint32_t word(int i, bool whole) const {
    if constexpr (kPerWord == 2) {
      if (!whole) return loaded_[2 * i] | loaded_[2 * i + 1] << 16;
    }
    return Product::rounded(loaded_[i]);
  }

  template <class Product>
  __device__ void store_vector(char* to, int i, bool whole) const {
    *reinterpret_cast<uint4*>(to) = {word<Product>(4 * i, whole), word<Product>(4 * i + 1, whole),
                                     word<Product>(4 * i + 2, whole),
                                     word<Product>(4 * i + 3, whole)};
  }
};

template <class E, int kRows>
class PositionsChunk : Fetched<E, kRows> {
  using Base = Fetched<E, kRows>;
  using Base::kPerWord;
  using Base::kSize;
  using Base::kVectors;
  using Base::kWords;
  using typename Base::Raw;
  static constexpr int kRowWords = kRowBytes / 4;

 public:
  // The padding puts eight rows at one position into different banks.
  static constexpr int kPitch = kRowBytes + 16;
  static constexpr int kRowStep = kPitch;
  static constexpr int kBytes = kPitch * kRows;
  static constexpr bool kRounded = true;  // as a Product has it

  // The byte where a row's 16 bytes begin that are the vector-th.
  static __device__ int at(int row, int vector) { return row * kPitch + vector * 16; }

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
    for (int i = 0; i < kWords; ++i) {
      const Column<int> column = columns[word_row(i)];
#pragma unroll
      for (int j = 0; j < kPerWord; ++j) {
        const Pixel<int>& pixel = j ? last : first;
        Base::template load<1>(i * kPerWord + j, from + pixel.offset + column.offset,
                               pixel.inside(task, column));
      }
    }
  }

  // `bytes` as the chunk was fetched with.
  template <class Product>
  __device__ void store(char* stage, int bytes) const {
    if (bytes == 16) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (vector_row(i) >= kRows) break;
        char* to = stage + vector_row(i) * kPitch + vector_position() * int{sizeof(Raw)};
        Base::template store_vector<Product>(to, i, true);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        char* to = stage + word_row(i) * kPitch + word_position() * int{sizeof(Raw)};
        *reinterpret_cast<uint32_t*>(to) = Base::template word<Product>(i, bytes == 4);
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
    const int half_warp = threadIdx.x / kRowWords;
    return i * (kThreads / kRowWords) + half_warp / 8 * 8 + half_warp % 2 * 4 + half_warp / 2 % 4;
  }
  static __device__ int word_position() { return threadIdx.x % kRowWords * kPerWord; }

  __device__ void fetch_matrix(const FisherSide& side, const Raw* from, int rows, int begin,
                               int positions) {
    if (side.bytes == 16) {
      const int p = begin + vector_position();
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int row = vector_row(i);
        const bool present = row < kRows && row < rows && p < positions;
        Base::template load<kSize>(i, from + row * narrow(side.row) + p, present);
      }
    } else if (kPerWord > 1 && side.bytes == 4) {
      fetch_words<kPerWord>(side, from, rows, begin + word_position(), positions);
    } else {
      fetch_words<1>(side, from, rows, begin + word_position(), positions);
    }
  }

  template <int kCount>
  __device__ void fetch_words(const FisherSide& side, const Raw* from, int rows, int first,
                              int positions) {
    const int step = kCount == 1 ? narrow(side.pixel) : 1;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int row = word_row(i);
#pragma unroll
      for (int j = 0; j < kPerWord; j += kCount) {
        const int p = first + j;
        Base::template load<kCount>((i * kPerWord + j) / kCount,
                                    from + row * narrow(side.row) + p * step,
                                    row < rows && p < positions);
      }
    }
  }
};

template <class E, int kRows>
class ChannelsChunk : Fetched<E, kRows> {
  using Base = Fetched<E, kRows>;
  using Base::kPerWord;
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
  static constexpr bool kRounded = true;

  // The byte of a row at a position.
  static __device__ int at(int row, int position) { return position * kPitch + row * kRowStep; }

  __device__ void fetch_dy(const FisherTask& task, const Raw* from, int rows, int begin) {
    if (task.dy.bytes == 16) return fetch_filters<kSize>(task, from, rows, begin);
    if (kPerWord > 1 && task.dy.bytes == 4) {
      return fetch_filters<kPerWord>(task, from, rows, begin);
    }
    fetch_filters<1>(task, from, rows, begin);
  }

  __device__ void fetch_x(const FisherTask& task, const Raw* from, const Column<int>* columns, int,
                          int begin) {
    if (task.x.bytes == 16) return fetch_columns<kSize>(task, from, columns, begin);
    if (kPerWord > 1 && task.x.bytes == 4) {
      return fetch_columns<kPerWord>(task, from, columns, begin);
    }
    fetch_columns<1>(task, from, columns, begin);
  }

  template <class Product>
  __device__ void store(char* stage, int bytes) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (position(i) >= kChunk<E>) break;
      char* to = stage + position(i) * kPitch + row() * int{sizeof(Raw)};
      Base::template store_vector<Product>(to, i, bytes >= 4);
    }
  }

 private:
  static __device__ int row() { return threadIdx.x % kAcross * kSize; }
  static __device__ int position(int i) { return i * (kThreads / kAcross) + threadIdx.x / kAcross; }

  template <int kCount>
  __device__ void fetch_filters(const FisherTask& task, const Raw* from, int rows, int begin) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int p = begin + position(i);
      const bool present = position(i) < kChunk<E> && p < narrow(task.positions);
      const Raw* at = from + p * narrow(task.dy.pixel) + row();
#pragma unroll
      for (int j = 0; j < kSize; j += kCount) {
        Base::template load<kCount>((i * kSize + j) / kCount, at + j, present && row() + j < rows);
      }
    }
  }

  template <int kCount>
  __device__ void fetch_columns(const FisherTask& task, const Raw* from, const Column<int>* columns,
                                int begin) {
    Pixel<int> pixels[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const bool present = position(i) < kChunk<E>;
      pixels[i] = Pixel<int>(task, present ? begin + position(i) : narrow(task.positions));
    }
#pragma unroll
    for (int j = 0; j < kSize; j += kCount) {
      const Column<int> column = columns[row() + j];
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        Base::template load<kCount>((i * kSize + j) / kCount,
                                    from + pixels[i].offset + column.offset,
                                    pixels[i].inside(task, column));
      }
    }
  }
};

}  // namespace tk
