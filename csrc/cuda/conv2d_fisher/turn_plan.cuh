// How x and dy have to lie for the pipelined kernel, which copies four bytes at least: channels of
// both side by side, or, where x is a matrix, positions of both, in runs of whole words. What lies
// otherwise is turned first, a slice of the examples after the other, if that is worth it; what
// only begins at an odd address is turned too, since bits must not depend on addresses.
#pragma once

#include "cuda/conv2d_fisher/fisher_task.cuh"

namespace tk {

struct PipelineLayout {
  bool fits;
  bool needs_room;  // of the workspace, by shape and order alone
  bool turns_x;
  bool turns_dy;
  int64_t channels;  // of a group, as x lies then
  int64_t filters;
  int64_t slice;  // examples
};

// Rows that begin at a whole word: at 16 bytes where that adds little.
inline int64_t whole_words(int64_t rows, int64_t element) {
  if (rows * element % 4 == 0) return rows;
  const int64_t unit = (rows >= 64 ? 16 : 4) / element;
  return divide_up(rows, unit) * unit;
}

// Half of the workspace is for what is turned, where shape and order alone ask for it.
inline PipelineLayout pipeline_layout(const FisherPlan& plan, const Conv2dFisherArgs& args,
                                      int64_t workspace_bytes) {
  const FisherTask& task = plan.task;
  const int64_t element = size_of(args.dtype);
  const int64_t pixels = args.image.h * args.image.w;
  PipelineLayout layout = {true,          false,        task.x.bytes < 4, task.dy.bytes < 4,
                           task.channels, task.filters, task.batch};
  const auto lies_well = [&](const FisherSide& side, bool inside, int64_t run) {
    return side.is_inside() == inside && run * element % 4 == 0;
  };
  const bool inside = plan.channels_inside;
  if ((inside || task.is_matrix) &&
      lies_well(task.x, inside, inside ? task.channels : task.positions) &&
      lies_well(task.dy, inside, inside ? task.filters : task.positions)) {
    if (!inside && (layout.turns_x || layout.turns_dy)) layout.turns_x = layout.turns_dy = true;
  } else {
    const int64_t elements = task.groups * (task.channels * pixels + task.filters * task.positions);
    const int64_t products = task.groups * task.filters * task.columns * task.positions;
    const int64_t example = element * task.groups *
                            (whole_words(task.channels, element) * pixels +
                             whole_words(task.filters, element) * task.positions);
    layout.slice = std::min(task.batch, workspace_bytes / 2 / example);
    layout.fits = products >= tile_costs(args.dtype).products_to_turn * elements &&
                  layout.slice * kRun >= task.batch;
    if (!layout.fits) return layout;
    layout.needs_room = true;
    layout.turns_x |= !lies_well(task.x, true, task.channels);
    layout.turns_dy |= !lies_well(task.dy, true, task.filters);
  }
  if (layout.turns_x) layout.channels = whole_words(task.channels, element);
  if (layout.turns_dy) layout.filters = whole_words(task.filters, element);
  return layout;
}

// `rows` of a group, channels inside, at an address that the workspace gives later.
inline FisherSide turned_side(const FisherTask& task, int64_t rows, int64_t pixels,
                              int64_t element) {
  const int64_t all = task.groups * rows;
  return {nullptr, all * pixels, rows,
          1,       all,          static_cast<int32_t>(rows * element % 16 == 0 ? 16 : 4)};
}

inline int64_t turned_floats(const FisherSide& side, int64_t examples, int64_t element) {
  return divide_up(divide_up(examples * side.example * element, int64_t{sizeof(float)}), 64) * 64;
}

inline void set_layout(FisherPlan& plan, const Conv2dFisherArgs& args,
                       const PipelineLayout& layout) {
  FisherTask& task = plan.task;
  const int64_t element = size_of(args.dtype);
  plan.slice = layout.slice;
  plan.halves_room = layout.needs_room;
  plan.turns_x = layout.turns_x;
  plan.turns_dy = layout.turns_dy;
  plan.x = task.x;
  plan.dy = task.dy;
  if (!plan.turns_x && !plan.turns_dy) return;
  plan.channels_inside = true;
  if (plan.turns_x) {
    task.padded_channels = layout.channels;
    task.x = turned_side(task, layout.channels, args.image.h * args.image.w, element);
    plan.turned_floats += turned_floats(task.x, plan.slice, element);
  }
  if (plan.turns_dy) {
    task.dy = turned_side(task, layout.filters, task.positions, element);
    plan.turned_floats += turned_floats(task.dy, plan.slice, element);
  }
}

}  // namespace tk
