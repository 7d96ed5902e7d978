// sparse_momentum: a step of momentum SGD in which the gradient reaches some elements only,
//   z ← (momentum·z + weight_decay·w) + (active ? g : 0)        w ← w − lr·z
// Active are the elements of ranked items that a table of global_threshold names, by the score
// |g·w| or, with row_scores, by that of the row; and all elements of items that are not ranked.
// Nothing is changed if the table says that a score is not finite. Each operation is rounded on its
// own, in float32 at least; the weight is computed from the z that is not yet rounded to its dtype.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace tk {

struct MomentumItem {
  void* weight;
  const void* grad;        // of the weight's dtype and order in memory, as is the momentum
  void* momentum;          // z
  const void* row_scores;  // float32, one for each row_elements elements, or null
  int64_t elements;
  int64_t row_elements;
  int64_t first;  // position of the first element, or of the first row
  DType dtype;
  bool ranked;
  double lr;
  double decay;  // the formula's weight_decay
  double beta;   // the formula's momentum, which z is multiplied by
};

struct SparseMomentumArgs {
  const void* table;
  std::vector<MomentumItem> items;
};

}  // namespace tk
