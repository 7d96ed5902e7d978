// rademacher: fills tensors with the random signs of philox.h, as 1 and -1; element e is the e-th
// in memory.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"
#include "common/item_list.h"

namespace tk {

struct RademacherItem {
  void* out;  // elements that lie without gaps, from a 16-byte-aligned address on
  int64_t elements;
  DType dtype;
  uint32_t stream;
};

using RademacherList = ItemList<RademacherItem>;

// The bits of 1; a minus is the highest bit of any type.
TK_HOST_DEVICE constexpr uint64_t bits_of_one(DType dtype) {
  return dtype == DType::f64   ? 0x3ff0000000000000
         : dtype == DType::f32 ? 0x3f800000
         : dtype == DType::f16 ? 0x3c00
                               : 0x3f80;
}

}  // namespace tk
