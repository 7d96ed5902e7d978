// Picks the CPU kernels for the processor at hand. CMakeLists.txt says which are linked in: TK_X86,
// those for AVX2, AVX-512 and the baseline; TK_ARM64, those for NEON alone; else the baseline
// alone.
#include "cpu/dispatch.h"

#include <atomic>
#include <stdexcept>

#include "cpu/kernels.h"

namespace tk {

namespace {

// The kernels of one instruction set.
#define TK_CPU_KERNEL_POINTER(op, Call) void (*op)(const Call& call, int threads);
struct Kernels {
  const char* isa;
  TK_OPS(TK_CPU_KERNEL_POINTER)
};

}  // namespace

#define TK_ADDRESS(op, Call) &op,
#define TK_CPU_KERNELS(isa)                               \
  TK_DECLARE_CPU_KERNELS(isa)                             \
  namespace isa {                                         \
  constexpr Kernels kernels = {#isa, TK_OPS(TK_ADDRESS)}; \
  }

#if defined(TK_ARM64)
TK_CPU_KERNELS(neon)
#else
TK_CPU_KERNELS(baseline)
#endif
#if defined(TK_X86)
TK_CPU_KERNELS(avx2)
TK_CPU_KERNELS(avx512)
#endif

namespace {

std::vector<Kernels> supported() {
  std::vector<Kernels> sets;
#if defined(TK_X86)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    sets.push_back(avx512::kernels);
  if (has_avx2) sets.push_back(avx2::kernels);
#endif
#if defined(TK_ARM64)
  sets.push_back(neon::kernels);
#else
  sets.push_back(baseline::kernels);
#endif
  return sets;
}

const std::vector<Kernels>& sets() {
  static const std::vector<Kernels> all = supported();
  return all;
}

std::atomic<size_t> chosen{0};

const Kernels& current() { return sets()[chosen]; }

}  // namespace

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const auto& set : sets()) names.push_back(set.isa);
  return names;
}

std::string cpu_isa() { return current().isa; }

void set_cpu_isa(const std::string& name) {
  for (size_t i = 0; i < sets().size(); ++i) {
    if (sets()[i].isa != name) continue;
    chosen = i;
    return;
  }
  throw std::invalid_argument("set_cpu_isa: this processor cannot run '" + name + "'");
}

#define TK_DEFINE_CPU_OP(op, Call) \
  void op##_cpu(const Call& call, int threads) { current().op(call, threads); }

TK_OPS(TK_DEFINE_CPU_OP)

}  // namespace tk
