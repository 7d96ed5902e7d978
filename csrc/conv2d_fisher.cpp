// The CPU kernel of conv2d_fisher; formula and layouts: conv2d_fisher.h. Compiled once per
// instruction set (TK_ISA); cpu_dispatch.cpp picks one at run time. A task is a filter.
#include "conv2d_fisher.h"

#include "cpu_kernels.h"
#include "parallel.h"
#include "simd.h"

namespace tk {
inline namespace TK_ISA {
namespace {

template <typename T>
double value(const void* p, int64_t at) {
  return load_first(static_cast<const T*>(p) + at, 1)[0];
}

// Element [n, channel, h, w] of an image batch in either layout.
template <typename T>
double pixel(const void* p, bool channels_last, int64_t channels, int64_t height, int64_t width,
             int64_t n, int64_t channel, int64_t h, int64_t w) {
  return value<T>(p, channels_last ? ((n * height + h) * width + w) * channels + channel
                                   : ((n * channels + channel) * height + h) * width + w);
}

template <typename T>
class Worker {
 public:
  explicit Worker(const Conv2dFisherArgs& args) : args_(args) {}

  void run(int64_t filter) {
    using S = typename Sum<T>::Scalar;
    const Conv2dFisherArgs& a = args_;
    const int64_t size = a.channels * a.kernel_h * a.kernel_w;
    double total = 0;
    for (int64_t k = 0; k < size; ++k) {
      double fisher = 0;
      for (int64_t n = 0; n < a.batch; ++n) {
        const double g = gradient(n, filter, k / (a.kernel_h * a.kernel_w),
                                  k / a.kernel_w % a.kernel_h, k % a.kernel_w);
        fisher += g * g;
      }
      if (!a.weight) static_cast<S*>(a.out)[filter * size + k] = fisher;
      if (!a.weight) continue;
      const double w = a.weight_dtype == DType::f32 ? value<float>(a.weight, filter * size + k)
                                                    : value<T>(a.weight, filter * size + k);
      total += w * w * fisher;
    }
    if (a.weight) static_cast<S*>(a.out)[filter] = total;
  }

  int64_t turn(int64_t) const { return -1; }
  void commit(int64_t) {}

 private:
  double gradient(int64_t n, int64_t filter, int64_t channel, int64_t i, int64_t j) const {
    const Conv2dFisherArgs& a = args_;
    channel += filter / a.filters * a.channels;
    double sum = 0;
    for (int64_t p = 0; p < a.out_height; ++p)
      for (int64_t q = 0; q < a.out_width; ++q) {
        const int64_t h = p * a.stride_h - a.pad_h + i * a.dilation_h;
        const int64_t w = q * a.stride_w - a.pad_w + j * a.dilation_w;
        if (h < 0 || h >= a.height || w < 0 || w >= a.width) continue;
        sum += pixel<T>(a.x, a.x_channels_last, a.groups * a.channels, a.height, a.width, n,
                        channel, h, w) *
               pixel<T>(a.dy, a.dy_channels_last, a.groups * a.filters, a.out_height, a.out_width,
                        n, filter, p, q);
      }
    return sum;
  }

  Conv2dFisherArgs args_;
};

template <typename T>
void run(const Conv2dFisherArgs& args, int threads) {
  ordered_tasks(args.groups * args.filters, threads, [&] { return Worker<T>(args); });
}

}  // namespace

void conv2d_fisher(const Conv2dFisherArgs& args, int threads) {
  switch (args.dtype) {
    case DType::f32:
      return run<float>(args, threads);
    case DType::f16:
      return run<Half>(args, threads);
    case DType::bf16:
      return run<BFloat16>(args, threads);
    case DType::f64:
      return run<double>(args, threads);
  }
}

}  // namespace TK_ISA
}  // namespace tk
