// The tasks of conv2d_fisher on the CPU that sum squares over a chunk of packed examples.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/conv2d_fisher/blocking.h"
#include "cpu/conv2d_fisher/micro_kernel.h"
#include "cpu/conv2d_fisher/pack_tasks.h"
#include "cpu/lanes.h"
#include "cpu/simd.h"

namespace tk {
inline namespace TK_ISA {

// Sums of squares of the tiles of a task over a chunk.
template <typename T>
class Summer : public IndependentTasks {
 public:
  using S = typename Sum<T>::Scalar;

  Summer(const Blocking<S>& blocking, const Chunk<S>& chunk, double* partials)
      : blocking_(&blocking), chunk_(chunk), partials_(partials) {
    const int64_t filters = kMaxRows + kMaxVectors * Sum<S>::kWidth;
    sums_.resize(kTiles * blocking.tile_size + kLanes);
    gradients_.resize(kTiles * blocking.tile_size);
    bands_.resize(kTiles * blocking.tile_size);
    runs_.resize(kTiles * blocking.tile_size + filters * kLanes);
  }

  void run(int64_t task) {
    const Blocking<S>& p = *blocking_;
    const int64_t tap_part = task % p.tap_parts;
    task /= p.tap_parts;
    const int64_t row_part = task % p.row_parts;
    task /= p.row_parts;
    const int64_t lane_part = task % p.lane_parts;
    gang_ = task / p.lane_parts;
    taps_ = part(tap_part, p.task_taps, p.taps);
    rows_ = part(row_part, p.task_rows, p.a.blocks());
    slot_ = (p.filters_in_lanes() ? row_part : lane_part) * p.tap_parts + tap_part;
    const Range lanes = part(lane_part, p.task_lanes, p.b.blocks());
    for (lanes_ = lanes.begin; lanes_ < lanes.end; ++lanes_) {
      std::fill_n(sums_.begin(), used(), S(0));
      if (p.near > 0)
        for (int64_t n = 0; n < chunk_.examples; n += p.near)
          sum(n, std::min(p.near, chunk_.examples - n), {0, p.args.out_image.h},
              {0, p.args.out_image.w}, true, sums_);
      else
        for (int64_t n = 0; n < chunk_.examples; ++n) sum_bands(n);
      write();
    }
  }

 private:
  void sum_bands(int64_t n) {
    const Blocking<S>& p = *blocking_;
    std::fill_n(gradients_.begin(), used(), S(0));
    std::fill_n(bands_.begin(), used(), S(0));
    int64_t bands = 0;
    for (int64_t h = 0; h < p.args.out_image.h; h += p.band_rows)
      for (int64_t w = 0; w < p.args.out_image.w; w += p.band_width) {
        sum(n, 1, {h, h + p.band_rows}, {w, w + p.band_width}, false, bands_);
        if (++bands % kMaxBands == 0) end_bands();
      }
    end_bands();
    for (int64_t i = 0; i < used(); ++i) sums_[i] += gradients_[i] * gradients_[i];
  }

  void end_bands() {
    for (int64_t i = 0; i < used(); ++i) gradients_[i] += std::exchange(bands_[i], S(0));
  }

  // All tiles over a window of the outputs of some examples.
  void sum(int64_t n, int64_t examples, Range heights, Range widths, bool square,
           std::vector<S>& to) {
    const Blocking<S>& p = *blocking_;
    const Conv2dFisherArgs& g = p.args;
    const bool swapped = p.filters_in_lanes();
    const int64_t a_step = p.a.position_step(), b_step = p.b.position_step();
    for (int64_t r = rows_.begin; r < rows_.end; ++r) {
      const S* a = panel(p.a, chunk_.a, r, n);
      const S* b = panel(p.b, chunk_.b, lanes_, n);
      for (int64_t tap = taps_.begin; tap < taps_.end; ++tap) {
        const int64_t i = tap / g.kernel.w, j = tap % g.kernel.w;
        const Range h = intersect(
            heights, inside(i, g.stride.h, g.padding.h, g.dilation.h, g.image.h, g.out_image.h));
        const Range w = intersect(
            widths, inside(j, g.stride.w, g.padding.w, g.dilation.w, g.image.w, g.out_image.w));
        if (h.size() <= 0 || w.size() <= 0) continue;
        const int64_t dy_at = h.begin * g.out_image.w + w.begin;
        const int64_t x_at = (h.begin * g.stride.h - g.padding.h + i * g.dilation.h) * g.image.w +
                             w.begin * g.stride.w - g.padding.w + j * g.dilation.w;
        const int64_t dy_row = g.out_image.w, x_row = g.stride.h * g.image.w;
        Walk walk = {examples,
                     h.size(),
                     w.size(),
                     p.a.positions() * a_step,
                     (swapped ? x_row : dy_row) * a_step,
                     (swapped ? g.stride.w : 1) * a_step,
                     p.b.positions() * b_step,
                     (swapped ? dy_row : x_row) * b_step,
                     (swapped ? 1 : g.stride.w) * b_step};
        if (walk.a_row == w.size() * walk.a_column && walk.b_row == w.size() * walk.b_column) {
          walk.columns *= walk.rows;  // one long row: tokens have none else
          walk.rows = 1;
        }
        p.sum_tile(a + (swapped ? x_at : dy_at) * a_step, b + (swapped ? dy_at : x_at) * b_step,
                   walk, square, to.data() + tile(r, tap));
      }
    }
  }

  // Where the panel of a block begins, for the n-th example of the chunk.
  const S* panel(const Factor& f, const S* panels, int64_t block, int64_t n) const {
    if (f.in_place)
      return static_cast<const S*>(f.data) +
             (chunk_.first + n) * f.positions() * f.position_step() + gang_ * f.channels +
             block * f.rows;
    return panels + ((gang_ * f.blocks() + block) * blocking_->chunk + n) * f.panel_size();
  }

  int64_t tile(int64_t row_block, int64_t tap) const {
    return ((row_block - rows_.begin) * blocking_->task_taps + tap - taps_.begin) *
           blocking_->tile_size;
  }
  int64_t used() const { return rows_.size() * blocking_->task_taps * blocking_->tile_size; }

  // From tiles to filters.
  void write() {
    const Blocking<S>& p = *blocking_;
    constexpr int64_t kWidth = Sum<S>::kWidth;
    const int64_t row_step = p.mapping.vectors * kWidth;
    for (int64_t r = rows_.begin; r < rows_.end; ++r) {
      const S* sums = sums_.data() + tile(r, taps_.begin);
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

  const Blocking<S>* blocking_;
  Chunk<S> chunk_;
  double* partials_;  // [filter][slot]
  std::vector<S> sums_, gradients_, bands_, runs_;
  Range rows_ = {}, taps_ = {};
  int64_t gang_ = 0, lanes_ = 0, slot_ = 0;
};

}  // namespace TK_ISA
}  // namespace tk
