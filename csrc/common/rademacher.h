// rademacher: fills tensors with the random signs of philox.h, as 1 and -1; element e is the e-th
// in memory.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"

namespace tk {

struct RademacherItem {
  void* out;  // elements that lie without gaps
  int64_t elements;
  DType dtype;
  uint32_t stream;
};

void rademacher_cpu(const RademacherItem* items, int64_t count, int threads, uint64_t seed);

// Launches on `stream` of the current device and returns without waiting. Outputs are 16-byte-
// aligned, and no f64. Throws std::runtime_error on a launch error.
void rademacher_cuda(const RademacherItem* items, int64_t count, void* stream, uint64_t seed);

// The bits of 1; a minus is the highest bit of any type.
TK_HOST_DEVICE constexpr uint64_t bits_of_one(DType dtype) {
  return dtype == DType::f64   ? 0x3ff0000000000000
         : dtype == DType::f32 ? 0x3f800000
         : dtype == DType::f16 ? 0x3c00
                               : 0x3f80;
}

}  // namespace tk
