// Runs the CPU kernels of one instruction set against sums in long double, without Python: under an
// emulator, too. Prints for every case its name, the largest error in roundings of Σ|terms|, and a
// hash of the bits of all results. What is read and written lies before a page that may be neither,
// as the last tensor of a mapping does: a kernel that reads beyond its end is killed.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"

namespace tk {
TK_DECLARE_CPU_KERNELS(TK_ISA)
}
using namespace tk;

constexpr uint64_t kSeed = 88172645463325252u;
static uint64_t state = kSeed;
static double uniform() {  // xorshift
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return static_cast<double>(state >> 11) / (1ull << 53) - 0.5;
}

// Bytes that end where a page begins that nobody may touch.
class Guarded {
  size_t page_ = sysconf(_SC_PAGESIZE), pages_, size_;
  char* first_;

 public:
  explicit Guarded(size_t size) : pages_((size + page_ - 1) / page_ + 1), size_(size) {
    void* all =
        mmap(nullptr, pages_ * page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    first_ = static_cast<char*>(all);
    if (all == MAP_FAILED || mprotect(first_ + (pages_ - 1) * page_, page_, PROT_NONE)) abort();
    std::memset(data(), 0x7f, size);  // no result, and no number that a sum leaves unseen
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(first_, pages_ * page_); }

  char* data() { return first_ + (pages_ - 1) * page_ - size_; }
  const char* data() const { return first_ + (pages_ - 1) * page_ - size_; }
  const char* begin() const { return data(); }
  const char* end() const { return data() + size_; }
};

// Values of a dtype, exact in it: their bytes and what they are.
struct Values {
  Guarded bytes;
  std::vector<double> exact;

  Values(DType dtype, int64_t count) : bytes(count * size_of(dtype)), exact(count) {
    for (int64_t i = 0; i < count; ++i) {
      const bool half = dtype == DType::f16 || dtype == DType::bf16;
      const float value = half ? static_cast<float>(std::lrint(uniform() * 128)) / 64
                               : static_cast<float>(uniform());
      exact[i] = value;
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      const uint16_t bf16 = bits >> 16;
      const uint32_t magnitude = ((bits & 0x7fffffff) >> 13) - (112 << 10);
      const uint16_t f16 = (bits >> 16 & 0x8000) | (value == 0 ? 0 : magnitude);
      const void* from[] = {&value, &f16, &bf16, &exact[i]};  // in the order of DType
      const int64_t size = size_of(dtype);
      std::memcpy(bytes.data() + i * size, from[static_cast<int>(dtype)], size);
    }
  }
};

static void report(const char* name, DType dtype, const Guarded& out,
                   const std::vector<long double>& sums, const std::vector<long double>& scale) {
  uint64_t hash = 14695981039346656037u;
  for (const char byte : out) hash = (hash ^ static_cast<unsigned char>(byte)) * 1099511628211u;
  double worst = 0;
  for (size_t i = 0; i < sums.size(); ++i) {
    double got;
    float single;
    if (dtype == DType::f64)
      std::memcpy(&got, out.data() + 8 * i, 8);
    else
      std::memcpy(&single, out.data() + 4 * i, 4), got = single;
    const double unit =
        (dtype == DType::f64 ? 0x1p-52 : 0x1p-23) * std::max(static_cast<double>(scale[i]), 1e-30);
    const double error = static_cast<double>(std::abs(got - sums[i])) / unit;
    worst = error > worst || std::isnan(error) ? error : worst;
  }
  std::printf("%s-%d %.3f %016llx\n", name, static_cast<int>(dtype), worst,
              static_cast<unsigned long long>(hash));
}

static void run_filter_moments(DType dtype, int64_t rows, int64_t channels, int64_t kernel,
                               bool channels_last, bool columns = true) {
  const int64_t count = rows * channels * kernel, filters = rows + (columns ? channels : 0);
  const Values w(dtype, count), g(dtype, count);
  const int64_t size = dtype == DType::f64 ? 8 : 4;
  Guarded out(filters * 5 * size);
  ParameterList call;
  call.items = {{w.bytes.data(), g.bytes.data(), nullptr, rows, channels, kernel, 1, out.data(),
                 columns ? out.data() + rows * 5 * size : nullptr, dtype, channels_last, 0}};
  TK_ISA::filter_moments(call, 1);
  std::vector<long double> sums(filters * 5), scale(filters * 5);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t p = i % (channels * kernel);
    const long double a = w.exact[i], b = g.exact[i];
    const long double terms[] = {a * b, a * a * b * b, std::abs(a * b), a * a, b * b};
    for (const int64_t f :
         {i / (channels * kernel), rows + (channels_last ? p % channels : p / kernel)})
      for (int m = 0; m < 5 && f < filters; ++m)
        sums[f * 5 + m] += terms[m], scale[f * 5 + m] += std::abs(terms[m]);
  }
  report("filter_moments", dtype, out, sums, scale);
}

static void run_gate_gradients(DType dtype, int64_t batch, int64_t outer, int64_t channels,
                               int64_t inner, bool biased = true) {
  const int64_t count = batch * outer * channels * inner;
  const Values y(dtype, count), dy(dtype, count), bias(dtype, channels);
  Guarded out(batch * channels * (dtype == DType::f64 ? 8 : 4));
  TK_ISA::gate_gradients({y.bytes.data(), dy.bytes.data(), biased ? bias.bytes.data() : nullptr,
                          out.data(), batch, outer, channels, inner, dtype},
                         1);
  std::vector<long double> sums(batch * channels), scale(batch * channels);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t c = i / inner % channels, to = i / (outer * channels * inner) * channels + c;
    const long double term = (y.exact[i] - (biased ? bias.exact[c] : 0)) * dy.exact[i];
    sums[to] += term, scale[to] += std::abs(term);
  }
  report("gate_gradients", dtype, out, sums, scale);
}

// Which kernels there are says TK_HAS_...; each has cases of its own, whatever runs beside it.
int main() {
#if defined(TK_HAS_filter_moments)
  state = kSeed;
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16, DType::f64}) {
    for (const bool last : {false, true}) {
      run_filter_moments(dtype, 5, 3, 9, last);
      run_filter_moments(dtype, 67, 129, 4, last);
    }
    run_filter_moments(dtype, 3, 5003, 1, false);
    run_filter_moments(dtype, 700, 24, 1, false);
    // Rows alone, of which several are read at once, and the last of them before the end.
    for (const int64_t width : {1, 2, 3, 4, 7, 9, 14, 16, 17, 25, 64})
      run_filter_moments(dtype, 21, 1, width, false, false);
  }
#endif
#if defined(TK_HAS_gate_gradients)
  state = kSeed;
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16, DType::f64}) {
    run_gate_gradients(dtype, 2, 1, 9, 49);
    run_gate_gradients(dtype, 2, 1, 3, 4999);
    run_gate_gradients(dtype, 3, 301, 77, 1);
    run_gate_gradients(dtype, 2, 1, 37, 1);
    // Rows of no, one and several times sixteen, whose last are read before the end.
    for (const int64_t inner : {3, 16, 49, 117}) {
      run_gate_gradients(dtype, 2, 1, 23, inner, false);
      run_gate_gradients(dtype, 1, 3, 18, inner);
    }
  }
#endif
}
