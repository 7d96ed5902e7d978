// Picks the CPU kernels for the processor at hand. TK_X86 says that the AVX2 and AVX-512 builds of
// them are linked in (CMakeLists.txt); elsewhere there is the baseline alone.
#include "cpu_dispatch.h"

#include "cpu_kernels.h"

namespace tk {

TK_DECLARE_CPU_KERNELS(baseline)
#if defined(TK_X86)
TK_DECLARE_CPU_KERNELS(avx2)
TK_DECLARE_CPU_KERNELS(avx512)
#endif

namespace {

struct Kernels {
  const char* isa;
  decltype(&baseline::filter_moments) filter_moments;
  decltype(&baseline::gate_gradients) gate_gradients;
};

Kernels choose() {
#if defined(TK_X86)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return {"AVX-512", avx512::filter_moments, avx512::gate_gradients};
  if (has_avx2) return {"AVX2", avx2::filter_moments, avx2::gate_gradients};
#endif
  return {"baseline", baseline::filter_moments, baseline::gate_gradients};
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace

const char* cpu_isa() { return kernels().isa; }

void filter_moments_cpu(const FilterMomentsItem* items, int64_t count, int threads) {
  kernels().filter_moments(items, count, threads);
}

void gate_gradients_cpu(const GateGradientsArgs& args, int threads) {
  kernels().gate_gradients(args, threads);
}

}  // namespace tk
