// How far exp and tanh of csrc/cpu/elementary.h are from float64, of the instruction set that this
// is compiled for: over the floats from argv[1] on in steps of argv[2], as integers.
// Prints for each function its greatest error in units in the last place of the exact result, and
// how many results of NaN, infinities, zeros and tiny numbers are not what they should be.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>

#include "cpu/elementary.h"
#include "cpu/store.h"

using namespace tk;

static double units_off(float got, double exact) {
  const float nearest = static_cast<float>(exact);
  if (std::isinf(nearest)) return std::isinf(got) ? 0 : 1e9;
  const double size = std::max(std::abs(exact), 0x1p-126);
  return std::abs(got - exact) / std::ldexp(1.0, std::ilogb(size) - 23);
}

template <class Vectors, class Exact>
static double worst(uint32_t start, uint32_t step, const Vectors& vectors, const Exact& exact,
                    double least) {
  constexpr int kWidth = Sum<float>::kWidth;
  double most = 0;
  uint64_t bits = start;
  while (bits < (uint64_t{1} << 32)) {
    float in[kWidth], out[kWidth];
    for (int i = 0; i < kWidth; ++i, bits += step) {
      const auto word = static_cast<uint32_t>(bits);
      std::memcpy(in + i, &word, 4);
      if (!std::isfinite(in[i]) || bits >= (uint64_t{1} << 32)) in[i] = 0;
    }
    store(out, vectors(load(in)));
    for (int i = 0; i < kWidth; ++i) {
      const double wanted = exact(static_cast<double>(in[i]));
      if (std::abs(wanted) < least) {  // below the normal numbers: 0 or they themselves
        if (std::abs(out[i] - wanted) > 0x1p-126) most = 1e9;
      } else {
        most = std::max(most, units_off(out[i], wanted));
      }
    }
  }
  return most;
}

template <class Vectors>
static float one(const Vectors& vectors, float x) {
  return vectors(splat<Floats>(x))[0];
}

int main(int, char** arguments) {
  const auto start = static_cast<uint32_t>(std::strtoul(arguments[1], nullptr, 10));
  const auto step = static_cast<uint32_t>(std::strtoul(arguments[2], nullptr, 10));
  const auto exp_of = [](Floats v) { return exponential(v); };
  const auto tanh_of = [](Floats v) { return hyperbolic_tangent(v); };
  std::printf("exp %.4f\n",
              worst(start, step, exp_of, [](double x) { return std::exp(x); }, 0x1p-126));
  std::printf("tanh %.4f\n",
              worst(start, step, tanh_of, [](double x) { return std::tanh(x); }, 0x1p-126));
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  int wrong = 0;
  wrong += !std::isnan(one(exp_of, nan)) + !std::isnan(one(tanh_of, nan));
  wrong += (one(exp_of, infinity) != infinity) + (one(exp_of, -infinity) != 0);
  wrong += (one(exp_of, 88.8f) != infinity) + (one(exp_of, 0.0f) != 1);
  wrong += (one(tanh_of, infinity) != 1) + (one(tanh_of, -infinity) != -1);
  wrong += !std::signbit(one(tanh_of, -0.0f)) + (one(tanh_of, 1e-30f) != 1e-30f);
  std::printf("special %d\n", wrong);
}
