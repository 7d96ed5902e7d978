// Element types a kernel can read. The names are part of the Python interface: backends/native.py.
#pragma once

#include <cstdint>

namespace tk {

enum class DType : int32_t { f32 = 0, f16 = 1, bf16 = 2, f64 = 3 };

constexpr int64_t size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

}  // namespace tk
