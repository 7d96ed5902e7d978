// The tasks of conv2d_example_norms on the CPU: a task adds up the squares of its tiles for each
// example of a chunk of packed examples.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/conv2d_fisher/tile_walk.h"
#include "cpu/simd.h"

namespace tk {
inline namespace TK_ISA {

// Floats add up the squares of a lane over the tiles of a task for one block of b, at most kTiles
// of them; then doubles take over.
template <typename T>
class NormSummer : public IndependentTasks, TileWalk<typename Sum<T>::Scalar> {
 public:
  using S = typename Sum<T>::Scalar;

  NormSummer(const Blocking<S>& blocking, const Chunk<S>& chunk, double* partials)
      : TileWalk<S>(blocking, chunk), partials_(partials) {
    norms_.resize(chunk.examples * Sum<S>::kWidth);
  }

  void run(int64_t task) {
    const Blocking<S>& p = *blocking_;
    const Range lanes = this->begin(task);
    for (lanes_ = lanes.begin; lanes_ < lanes.end; ++lanes_) {
      for (int64_t n = 0; n < chunk_.examples; n += std::max<int64_t>(p.near, 1)) {
        if (p.near > 0)
          sum(n);
        else
          sum_bands(n);
      }
      for (int64_t n = 0; n < chunk_.examples; ++n)
        for (int64_t lane = 0; lane < kWidth; ++lane)
          partials_[n * p.tasks() + task] += std::exchange(norms_[n * kWidth + lane], S(0));
    }
  }

 private:
  static constexpr int64_t kWidth = Sum<S>::kWidth;
  using TileWalk<S>::blocking_;
  using TileWalk<S>::chunk_;
  using TileWalk<S>::gradients_;
  using TileWalk<S>::lanes_;

  // The examples from n on whose panels stay near.
  void sum(int64_t n) {
    const Blocking<S>& p = *blocking_;
    this->for_each_tile(n, std::min(p.near, chunk_.examples - n), {0, p.args.out_image.h},
                        {0, p.args.out_image.w},
                        [&](const S* a, const S* b, const Walk& walk, int64_t) {
                          p.norm_tile(a, b, walk, true, norms_.data() + n * kWidth);
                        });
  }

  void sum_bands(int64_t n) {
    this->sum_in_bands(n);
    for (int64_t i = 0; i < this->used(); ++i)
      norms_[n * kWidth + i % kWidth] += gradients_[i] * gradients_[i];
  }

  double* partials_;      // [example][task]
  std::vector<S> norms_;  // [example][lane]
};

}  // namespace TK_ISA
}  // namespace tk
