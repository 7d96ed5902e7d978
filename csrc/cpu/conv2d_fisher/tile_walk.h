// What the tasks of conv2d_fisher and conv2d_example_norms on the CPU share: which tiles of the
// weight a task has, and how products run over them in a chunk of packed examples.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/conv2d_fisher/blocking.h"
#include "cpu/conv2d_fisher/micro_kernel.h"
#include "cpu/conv2d_fisher/pack_tasks.h"

namespace tk {
inline namespace TK_ISA {

template <typename S>
class TileWalk {
 protected:
  TileWalk(const Blocking<S>& blocking, const Chunk<S>& chunk)
      : blocking_(&blocking), chunk_(chunk) {
    gradients_.resize(kTiles * blocking.tile_size);
    bands_.resize(kTiles * blocking.tile_size);
  }

  // The blocks of b of a task, which are taken one after the other.
  Range begin(int64_t task) {
    const Blocking<S>& p = *blocking_;
    tap_part_ = task % p.tap_parts;
    task /= p.tap_parts;
    row_part_ = task % p.row_parts;
    task /= p.row_parts;
    lane_part_ = task % p.lane_parts;
    gang_ = task / p.lane_parts;
    taps_ = part(tap_part_, p.task_taps, p.taps);
    rows_ = part(row_part_, p.task_rows, p.a.blocks());
    return part(lane_part_, p.task_lanes, p.b.blocks());
  }

  // Calls sum(a, b, walk, tile) for all tiles over a window of the outputs of some examples.
  template <class EachTile>
  void for_each_tile(int64_t n, int64_t examples, Range heights, Range widths,
                     const EachTile& sum) const {
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
        sum(a + (swapped ? x_at : dy_at) * a_step, b + (swapped ? dy_at : x_at) * b_step, walk,
            tile(r, tap));
      }
    }
  }

  // The gradients of an example that is summed in bands, into gradients_.
  void sum_in_bands(int64_t n) {
    const Blocking<S>& p = *blocking_;
    std::fill_n(gradients_.begin(), used(), S(0));
    std::fill_n(bands_.begin(), used(), S(0));
    int64_t bands = 0;
    for (int64_t h = 0; h < p.args.out_image.h; h += p.band_rows)
      for (int64_t w = 0; w < p.args.out_image.w; w += p.band_width) {
        for_each_tile(n, 1, {h, h + p.band_rows}, {w, w + p.band_width},
                      [&](const S* a, const S* b, const Walk& walk, int64_t at) {
                        p.sum_tile(a, b, walk, false, bands_.data() + at);
                      });
        if (++bands % kMaxBands == 0) end_bands();
      }
    end_bands();
  }

  int64_t tile(int64_t row_block, int64_t tap) const {
    return ((row_block - rows_.begin) * blocking_->task_taps + tap - taps_.begin) *
           blocking_->tile_size;
  }
  int64_t used() const { return rows_.size() * blocking_->task_taps * blocking_->tile_size; }

  const Blocking<S>* blocking_;
  Chunk<S> chunk_;
  std::vector<S> gradients_, bands_;
  Range rows_ = {}, taps_ = {};
  int64_t gang_ = 0, lanes_ = 0;  // lanes_: the block of b
  int64_t tap_part_ = 0, row_part_ = 0, lane_part_ = 0;

 private:
  void end_bands() {
    for (int64_t i = 0; i < used(); ++i) gradients_[i] += std::exchange(bands_[i], S(0));
  }

  // Where the panel of a block begins, for the n-th example of the chunk.
  const S* panel(const Factor& f, const S* panels, int64_t block, int64_t n) const {
    if (f.in_place)
      return static_cast<const S*>(f.data) +
             (chunk_.first + n) * f.positions() * f.position_step() + gang_ * f.channels +
             block * f.rows;
    return panels + ((gang_ * f.blocks() + block) * blocking_->chunk + n) * f.panel_size();
  }
};

}  // namespace TK_ISA
}  // namespace tk
