// How conv2d_fisher on the CPU cuts a convolution: which channels are lanes, how many examples make
// a chunk, what a task is. The order of every sum follows from the shape; of the threads, only how
// many tiles a task takes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/conv2d_fisher.h"
#include "cpu/conv2d_fisher/micro_kernel.h"
#include "cpu/conv2d_fisher/packing.h"

namespace tk {
inline namespace TK_ISA {

constexpr int64_t kPanelBytes = 3 << 20;      // of a chunk: 2 to 4 MB were best, L3 is slower
constexpr int64_t kTileBytes = 64 << 10;      // of panels that stay near while all taps run past
constexpr int64_t kReadableBytes = 2048;      // of a position, to be read without packing
constexpr int64_t kMaxChunk = 256;            // examples whose squares are summed in a float
constexpr int64_t kMaxRun = 256;              // positions whose products are
constexpr int64_t kMaxBands = 256;            // of positions, whose sums are
constexpr int64_t kTiles = 16;                // most tiles of sums that a task keeps: 16 KB
constexpr int64_t kMinTasks = 8;              // for the threads; more of them cost a stem a tenth
constexpr int64_t kSlots = 16;                // partial sums of a filter, where a task can run on
constexpr int64_t kPackElements = 1 << 14;    // of a task that packs
constexpr int64_t kElementProducts = 32;      // as long as these take to read or write an element
constexpr int64_t kThreadProducts = 8 << 20;  // under 100 µs of work a second thread costs more

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

inline Range intersect(Range a, Range b) {
  return {std::max(a.begin, b.begin), std::min(a.end, b.end)};
}

// The i-th part of `step`.
inline Range part(int64_t i, int64_t step, int64_t end) {
  return {i * step, std::min((i + 1) * step, end)};
}

// The outputs along one axis for which a tap lies inside of the image.
inline Range inside(int64_t tap, int64_t stride, int64_t pad, int64_t dilation, int64_t extent,
                    int64_t outputs) {
  const int64_t shift = pad - tap * dilation;  // input = output · stride − shift
  return intersect({0, outputs}, {shift > 0 ? ceil_div(shift, stride) : 0,
                                  extent + shift > 0 ? ceil_div(extent + shift, stride) : 0});
}

// What the lanes of a vector are.
enum class Lanes { channels, filters, groups };

struct Mapping {
  Lanes lanes;
  int64_t rows, vectors;  // of a tile
};

// The mapping that fills vectors and registers best. A position costs a tile the larger of its
// multiply-adds and its loads, of which processors do as many a cycle. Lanes are channels unless
// there are few, as in a stem, where filters take their place; groups where each has few of both.
template <typename S>
Mapping choose_mapping(const Conv2dFisherArgs& args) {
  constexpr int64_t kWidth = Sum<S>::kWidth;
  auto even = [](int64_t count, int64_t most) { return ceil_div(count, ceil_div(count, most)); };
  Mapping best = {};
  int64_t least = INT64_MAX;
  auto consider = [&](Lanes lanes, int64_t rows, int64_t vectors, int64_t tiles) {
    const int64_t cost = tiles * std::max(rows * vectors, rows + vectors);
    if (cost < least) best = {lanes, rows, vectors}, least = cost;
  };
  for (Lanes lanes : {Lanes::channels, Lanes::filters}) {
    const int64_t in_lanes = lanes == Lanes::channels ? args.channels : args.filters;
    const int64_t in_rows = lanes == Lanes::channels ? args.filters : args.channels;
    const int64_t rows = even(in_rows, kMaxRows);
    for (int64_t vectors = kMaxVectors; vectors > 0; --vectors)
      consider(lanes, rows, vectors,
               args.groups * ceil_div(in_rows, rows) * ceil_div(in_lanes, vectors * kWidth));
  }
  const int64_t rows = even(args.filters, kMaxLanewiseRows);
  const int64_t vectors = even(args.channels, kMaxVectors);
  consider(Lanes::groups, rows, vectors,
           ceil_div(args.groups, kWidth) * ceil_div(args.filters, rows) *
               ceil_div(args.channels, vectors));
  return best;
}

template <typename S>
struct Blocking {
  Conv2dFisherArgs args;
  Mapping mapping;
  int threads;  // as many as the work is worth
  Factor a, b;  // the rows and the lanes of tiles
  SumTile<S> sum_tile;
  SumTile<S> norm_tile;  // or null, where none are wanted
  int64_t gangs;         // of groups: see Factor
  int64_t tile_size;     // elements
  int64_t taps;
  int64_t chunk;       // examples packed at a time
  int64_t near;        // examples whose panels stay near; 0: an example is summed in bands of
  int64_t band_rows;   // so many rows and
  int64_t band_width;  // columns of the output

  // A task is some taps, some blocks of a (the rows of its tiles), and blocks of b one after the
  // other, of a gang.
  int64_t task_taps, task_rows, task_lanes;
  int64_t tap_parts, row_parts, lane_parts;

  Blocking(const Conv2dFisherArgs& arguments, int most_threads, bool norms = false)
      : args(arguments), mapping(choose_mapping<S>(arguments)), threads(useful(most_threads)) {
    constexpr int64_t kWidth = Sum<S>::kWidth;
    const bool lanewise = mapping.lanes == Lanes::groups;
    const int64_t gang = lanewise ? kWidth : 1;
    const int64_t lanes = lanewise ? mapping.vectors : mapping.vectors * kWidth;
    const bool swapped = filters_in_lanes();
    Factor x = {args.input,
                args.input_channels_last != 0,
                args.batch,
                args.groups,
                args.channels,
                args.image.h,
                args.image.w,
                gang,
                swapped ? mapping.rows : lanes};
    Factor dy = {args.grad_output,
                 args.grad_channels_last != 0,
                 args.batch,
                 args.groups,
                 args.filters,
                 args.out_image.h,
                 args.out_image.w,
                 gang,
                 swapped ? lanes : mapping.rows};
    x.in_place = readable(x);
    dy.in_place = readable(dy);
    a = swapped ? x : dy;
    b = swapped ? dy : x;
    sum_tile = sum_tile_of<S, false>(mapping.rows, mapping.vectors, lanewise);
    norm_tile = norms ? sum_tile_of<S, true>(mapping.rows, mapping.vectors, lanewise) : nullptr;
    gangs = ceil_div(args.groups, gang);
    tile_size = mapping.rows * mapping.vectors * kWidth;
    taps = args.kernel.h * args.kernel.w;

    const int64_t example = gangs * (a.blocks() * a.panel_size() + b.blocks() * b.panel_size());
    chunk = std::clamp<int64_t>(kPanelBytes / sizeof(S) / example, 1, kMaxChunk);
    chunk = ceil_div(args.batch, ceil_div(args.batch, chunk));
    const int64_t near_elements = kTileBytes / sizeof(S);
    near = dy.positions() > kMaxRun ? 0 : near_elements / (a.panel_size() + b.panel_size());
    band_width = std::min(args.out_image.w, kMaxRun);
    const int64_t row = dy.width * dy.panel_width() + args.stride.h * x.width * x.panel_width();
    band_rows = std::max<int64_t>(std::min(kMaxRun / band_width, near_elements / row), 1);

    const int64_t tiles = gangs * a.blocks() * b.blocks();
    task_taps = ceil_div(taps, std::max(ceil_div(taps, kTiles), std::min(taps, kMinTasks / tiles)));
    tap_parts = ceil_div(taps, task_taps);
    // Partial sums follow the rows of a task where these are channels, and those of norms always;
    // they may not hang on threads.
    const int64_t row_tasks = threads == 1 && !swapped && !norms ? 1 : kMinTasks;
    task_rows = std::clamp<int64_t>(tiles * tap_parts / row_tasks, 1, kTiles / task_taps);
    row_parts = ceil_div(a.blocks(), task_rows);
    task_lanes = swapped ? 1 : ceil_div(b.blocks(), std::max<int64_t>(kSlots / tap_parts, 1));
    lane_parts = ceil_div(b.blocks(), task_lanes);
  }

  // Whether tiles can read the tensor itself: narrow rows of the type of the sums, cut evenly.
  bool readable(const Factor& f) const {
    return size_of(args.dtype) == sizeof(S) && f.channels_last && f.gang == 1 &&
           f.channels % f.rows == 0 && f.groups * f.channels * sizeof(S) <= kReadableBytes;
  }

  bool filters_in_lanes() const { return mapping.lanes == Lanes::filters; }
  int64_t panels(const Factor& f) const { return gangs * f.blocks(); }
  int64_t chunk_size(const Factor& f) const {
    return f.in_place ? 0 : panels(f) * chunk * f.panel_size();
  }
  int64_t tasks() const { return gangs * lane_parts * row_parts * tap_parts; }

  // Partial sums of a filter: one for each task that has channels or taps of it.
  int64_t slots() const { return tap_parts * (filters_in_lanes() ? row_parts : lane_parts); }

  int useful(int most) const {
    const int64_t weights =
        args.groups * args.filters * args.channels * args.kernel.h * args.kernel.w;
    const int64_t elements = args.batch * args.groups *
                                 (args.channels * args.image.h * args.image.w +
                                  args.filters * args.out_image.h * args.out_image.w) +
                             weights;
    const int64_t work =
        args.batch * weights * args.out_image.h * args.out_image.w + elements * kElementProducts;
    return static_cast<int>(std::min<int64_t>(most, work / kThreadProducts + 1));
  }
};

}  // namespace TK_ISA
}  // namespace tk
