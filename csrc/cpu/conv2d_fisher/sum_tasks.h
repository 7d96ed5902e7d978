// The tasks of conv2d_fisher on the CPU that sum squares over a chunk of packed examples.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/conv2d_fisher/tile_walk.h"
#include "cpu/lanes.h"
#include "cpu/simd.h"

namespace tk {
inline namespace TK_ISA {

// Sums of squares of the tiles of a task over a chunk.
template <typename T>
class Summer : public IndependentTasks, TileWalk<typename Sum<T>::Scalar> {
 public:
  using S = typename Sum<T>::Scalar;

  Summer(const Blocking<S>& blocking, const Chunk<S>& chunk, double* partials)
      : TileWalk<S>(blocking, chunk), partials_(partials) {
    const int64_t filters = kMaxRows + kMaxVectors * Sum<S>::kWidth;
    sums_.resize(kTiles * blocking.tile_size + kLanes);
    runs_.resize(kTiles * blocking.tile_size + filters * kLanes);
  }

  void run(int64_t task) {
    const Blocking<S>& p = *blocking_;
    const Range lanes = this->begin(task);
    slot_ = (p.filters_in_lanes() ? row_part_ : lane_part_) * p.tap_parts + tap_part_;
    for (lanes_ = lanes.begin; lanes_ < lanes.end; ++lanes_) {
      std::fill_n(sums_.begin(), this->used(), S(0));
      if (p.near > 0)
        for (int64_t n = 0; n < chunk_.examples; n += p.near) sum(n);
      else
        for (int64_t n = 0; n < chunk_.examples; ++n) sum_bands(n);
      write();
    }
  }

 private:
  using TileWalk<S>::blocking_;
  using TileWalk<S>::chunk_;
  using TileWalk<S>::gradients_;
  using TileWalk<S>::rows_;
  using TileWalk<S>::taps_;
  using TileWalk<S>::gang_;
  using TileWalk<S>::lanes_;
  using TileWalk<S>::tap_part_;
  using TileWalk<S>::row_part_;
  using TileWalk<S>::lane_part_;

  // The examples from n on whose panels stay near.
  void sum(int64_t n) {
    const Blocking<S>& p = *blocking_;
    this->for_each_tile(n, std::min(p.near, chunk_.examples - n), {0, p.args.out_image.h},
                        {0, p.args.out_image.w},
                        [&](const S* a, const S* b, const Walk& walk, int64_t at) {
                          p.sum_tile(a, b, walk, true, sums_.data() + at);
                        });
  }

  void sum_bands(int64_t n) {
    this->sum_in_bands(n);
    for (int64_t i = 0; i < this->used(); ++i) sums_[i] += gradients_[i] * gradients_[i];
  }

  // From tiles to filters.
  void write() {
    const Blocking<S>& p = *blocking_;
    constexpr int64_t kWidth = Sum<S>::kWidth;
    const int64_t row_step = p.mapping.vectors * kWidth;
    for (int64_t r = rows_.begin; r < rows_.end; ++r) {
      const S* sums = sums_.data() + this->tile(r, taps_.begin);
      const Range rows = part(r, p.a.rows, p.a.channels);
      const Range lanes = part(lanes_, p.b.rows, p.b.channels);
      switch (p.mapping.lanes) {
        case Lanes::channels:
          write(sums, gang_, rows, row_step, lanes, 1);
          break;
        case Lanes::filters:
          write(sums, gang_, lanes, 1, rows, row_step);
          break;
        case Lanes::groups:
          const Range groups = part(gang_, kWidth, p.args.groups);
          for (int64_t g = groups.begin; g < groups.end; ++g)
            write(sums + g - groups.begin, g, rows, row_step, lanes, kWidth);
      }
    }
  }

  // Some filters and channels of a group; they lie so far apart in the tile of each tap. All runs
  // of the weight's order are laid out before one is read: what was just stored in other pieces is
  // slow to load.
  void write(const S* sums, int64_t group, Range filters, int64_t filter_step, Range channels,
             int64_t channel_step) {
    const Blocking<S>& p = *blocking_;
    const int64_t taps = taps_.size(), count = channels.size();
    const S* runs = runs_.data();
    int64_t runs_step = count * taps + kLanes;
    if (taps == 1 && channel_step == 1) {
      runs = sums;
      runs_step = filter_step;
    } else {
      for (int64_t f = 0; f < filters.size(); ++f)
        lay_out(sums + f * filter_step, count, channel_step, runs_.data() + f * runs_step);
    }
    for (int64_t f = 0; f < filters.size(); ++f) {
      const S* run = runs + f * runs_step;
      const int64_t filter = group * p.args.filters + filters.begin + f;
      const int64_t first = (filter * p.args.channels + channels.begin) * p.taps + taps_.begin;
      // All taps of the channels are one run of the weight; some taps are one for each channel.
      const bool whole = taps == p.taps;
      const int64_t pieces = whole ? 1 : count, length = whole ? count * taps : taps;
      if (p.args.weight) {
        partials_[filter * p.slots() + slot_] += p.args.weight_dtype == DType::f32
                                                     ? weighted<float>(run, first, pieces, length)
                                                     : weighted<T>(run, first, pieces, length);
        continue;
      }
      for (int64_t i = 0; i < pieces; ++i)
        add(run + i * length, length, static_cast<S*>(p.args.out) + first + i * p.taps);
    }
  }

  // [tap][channel] as [channel][tap].
  void lay_out(const S* sums, int64_t channels, int64_t channel_step, S* run) const {
    const int64_t taps = taps_.size(), size = blocking_->tile_size;
    if (channel_step == 1) {
      for (int64_t c = 0; c < channels; c += kLanes)
        transpose(sums + c, size, taps, run + c * taps, taps,
                  std::min<int64_t>(channels - c, kLanes));
      return;
    }
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t t = 0; t < taps; ++t) run[c * taps + t] = sums[t * size + c * channel_step];
  }

  void add(const S* from, int64_t length, S* to) const {
    if (chunk_.first == 0) {
      std::copy_n(from, length, to);
      return;
    }
    for (int64_t i = 0; i < length; ++i) to[i] += from[i];
  }

  // Σ weight²·run over pieces that lie a channel apart in the weight.
  template <typename W>
  double weighted(const S* run, int64_t first, int64_t pieces, int64_t length) const {
    using V = typename Sum<T>::Vector;
    const Conv2dFisherArgs& g = blocking_->args;
    const int64_t size = g.groups * g.filters * g.channels * blocking_->taps;
    const W* weight = static_cast<const W*>(g.weight);
    V sums[1][kRegistersOf<S>] = {};
    for (int64_t k = 0; k < pieces; ++k, first += blocking_->taps, run += length) {
      for (int64_t i = 0; i < length; i += kLanes) {
        typename Sum<W>::Scalar read[kLanes] = {};
        S w[kLanes];
        widen(weight + first + i, length - i, size - first - i, read);
        std::copy_n(read, kLanes, w);
        for (int r = 0; r < kRegistersOf<S>; ++r) {
          const int64_t at = i + r * Sum<S>::kWidth;
          const V f = load_first(run + at, length - at, Sum<S>::kWidth);  // runs have room behind
          const V each = load(w + r * Sum<S>::kWidth);
          sums[0][r] = multiply_add(each * f, each, sums[0][r]);
        }
      }
    }
    double total[1] = {};
    add_lanes(sums, total);
    return total[0];
  }

  double* partials_;  // [filter][slot]
  std::vector<S> sums_, runs_;
  int64_t slot_ = 0;
};

}  // namespace TK_ISA
}  // namespace tk
