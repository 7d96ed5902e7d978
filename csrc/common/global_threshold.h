// global_threshold: which elements of many tensors are the `wanted` greatest of all, exactly.
//
// The score of an element is |a·b|, |a| without b, or a itself (is_signed), rounded to float32. Its
// key is a number of 32 bits; keys are ordered as scores are. Scores that are equal go by their
// position: elements are numbered through all ranked items, each as it lies in memory. The table
//   { key, last, broken }
// says of an element that it is among the `wanted` if its key is greater than `key`, or equal and
// its position at most `last`; `last` is INT64_MAX if all that are equal are among them. `broken`
// is 0, or items − i for the first item i that has a score which is not finite. Items that are not
// ranked are looked at for that alone: at the elements of b, or of a where there is no b.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "common/host_device.h"

namespace tk {

struct ScoreItem {
  const void* a;
  const void* b;  // or null; of the dtype of a
  int64_t elements;
  DType dtype;
  bool ranked;
};

struct GlobalThresholdArgs {
  void* table;  // three int64
  std::vector<ScoreItem> items;
  int64_t wanted;  // from 1 to the elements of the ranked items
  bool is_signed;
};

// A key is read in digits of 11, 11 and 10 bits, the highest first.
constexpr int kDigits = 3;
constexpr int kBins = 2048;
constexpr uint32_t kInfinity = 0x7f800000;  // its bits; those of a NaN, without the sign, are more

TK_HOST_DEVICE constexpr int digit_shift(int digit) {
  return digit == 0 ? 21 : digit == 1 ? 10 : 0;
}
TK_HOST_DEVICE constexpr uint32_t digit_mask(int digit) { return digit == 2 ? 1023 : 2047; }
// The bits above a digit.
TK_HOST_DEVICE constexpr uint32_t prefix_mask(int digit) {
  return digit == 0 ? 0 : ~((digit_mask(digit) + 1) * (1u << digit_shift(digit)) - 1);
}

// Of the bits of a score; of one that has a sign, 0 and -0 were made the same.
TK_HOST_DEVICE inline uint32_t key_of(uint32_t bits, bool is_signed) {
  if (!is_signed) return bits & 0x7fffffff;
  return bits >> 31 ? ~bits : bits | 0x80000000;
}

}  // namespace tk
