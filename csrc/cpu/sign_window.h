// The random signs (philox.h) of a stretch of elements, for the CPU kernels.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/philox.h"
#include "cpu/simd.h"

namespace tk {
inline namespace TK_ISA {

class SignWindow {
 public:
  static constexpr int64_t kBatch = 128 * kLanes;  // elements whose signs are drawn at once
  static constexpr int64_t kMost = 2 * kBatch;     // elements that may be asked for together

  SignWindow(uint64_t seed, uint32_t stream) : seed_(seed), stream_(stream) {}

  // Makes sure that the signs of elements [begin, end) are here.
  void cover(int64_t begin, int64_t end) {
    if (begin >= begin_ && end <= end_) return;
    begin_ = end_ = begin / 128 * 128;
    for (uint32_t* to = words_; end_ < end; to += kBatch / 32, end_ += kBatch) draw(to);
  }

  // Of the sixteen elements from `element` on, the first one's in the lowest bit; higher bits are
  // of no meaning. Words are little-endian: their bytes follow each other.
  uint32_t at(int64_t element) const {
    const int64_t bit = element - begin_;
    uint32_t bits;
    std::memcpy(&bits, reinterpret_cast<const char*>(words_) + bit / 8, sizeof(bits));
    return bits >> (bit & 7);
  }

 private:
  void draw(uint32_t* to) const {
    for (int lane = 0; lane < kLanes; ++lane) {  // one vector of blocks
      uint32_t bits[4];
      random_signs(bits, seed_, stream_, end_ / 128 + lane);
      for (int i = 0; i < 4; ++i) to[4 * lane + i] = bits[i];
    }
  }

  uint64_t seed_;
  uint32_t stream_;
  int64_t begin_ = 0, end_ = 0;
  // One batch more for a start within a block, and a word that at() reads beyond the last.
  uint32_t words_[(kMost + kBatch) / 32 + 1] = {};
};

}  // namespace TK_ISA
}  // namespace tk
