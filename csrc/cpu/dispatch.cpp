// Picks the CPU kernels for the processor at hand. TK_X86 says that the AVX2 and AVX-512 builds of
// them are linked in (CMakeLists.txt); elsewhere there is the baseline alone.
#include "cpu/dispatch.h"

#include <atomic>
#include <stdexcept>

#include "cpu/kernels.h"

namespace tk {

TK_DECLARE_CPU_KERNELS(baseline)
#if defined(TK_X86)
TK_DECLARE_CPU_KERNELS(avx2)
TK_DECLARE_CPU_KERNELS(avx512)
#endif

namespace {

struct Kernels {
  const char* isa;
  decltype(&baseline::conv2d_fisher) conv2d_fisher;
  decltype(&baseline::filter_moments) filter_moments;
  decltype(&baseline::gate_gradients) gate_gradients;
  decltype(&baseline::hutchinson_moments) hutchinson_moments;
  decltype(&baseline::rademacher) rademacher;
  decltype(&baseline::second_order_moments) second_order_moments;
};

#define TK_KERNELS(isa)                                                                          \
  Kernels {                                                                                      \
    #isa, isa::conv2d_fisher, isa::filter_moments, isa::gate_gradients, isa::hutchinson_moments, \
        isa::rademacher, isa::second_order_moments                                               \
  }

std::vector<Kernels> supported() {
  std::vector<Kernels> sets;
#if defined(TK_X86)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    sets.push_back(TK_KERNELS(avx512));
  if (has_avx2) sets.push_back(TK_KERNELS(avx2));
#endif
  sets.push_back(TK_KERNELS(baseline));
  return sets;
}

const std::vector<Kernels>& sets() {
  static const std::vector<Kernels> all = supported();
  return all;
}

std::atomic<size_t> chosen{0};

const Kernels& kernels() { return sets()[chosen]; }

}  // namespace

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const auto& set : sets()) names.push_back(set.isa);
  return names;
}

std::string cpu_isa() { return kernels().isa; }

void set_cpu_isa(const std::string& name) {
  for (size_t i = 0; i < sets().size(); ++i) {
    if (sets()[i].isa != name) continue;
    chosen = i;
    return;
  }
  throw std::invalid_argument("set_cpu_isa: this processor cannot run '" + name + "'");
}

void conv2d_fisher_cpu(const Conv2dFisherArgs& args, int threads) {
  kernels().conv2d_fisher(args, threads);
}

void filter_moments_cpu(const ParameterItem* items, int64_t count, int threads) {
  kernels().filter_moments(items, count, threads);
}

void gate_gradients_cpu(const GateGradientsArgs& args, int threads) {
  kernels().gate_gradients(args, threads);
}

void hutchinson_moments_cpu(const ParameterItem* items, int64_t count, int threads, uint64_t seed) {
  kernels().hutchinson_moments(items, count, threads, seed);
}

void rademacher_cpu(const RademacherItem* items, int64_t count, int threads, uint64_t seed) {
  kernels().rademacher(items, count, threads, seed);
}

void second_order_moments_cpu(const ParameterItem* items, int64_t count, int threads) {
  kernels().second_order_moments(items, count, threads);
}

}  // namespace tk
