// sparse_momentum (common/sparse_momentum.h): one pass, told by the table what is active.
#include "common/global_threshold.h"
#include "common/ops.h"
#include "common/sparse_momentum.h"
#include "cuda/list_launch.cuh"
#include "cuda/vector_store.cuh"

namespace tk {
namespace {

struct MomentumEntry {
  void* weight;
  const void* grad;
  void* momentum;
  const float* row_scores;
  int64_t elements;
  int64_t row_elements;
  int64_t first;
  float lr;
  float decay;
  float beta;
  uint32_t first_block;
  uint8_t dtype;
  bool ranked;
  bool aligned;
};

struct Threshold {
  int64_t key;
  int64_t last;

  __device__ bool below(float score, int64_t position) const {
    const int64_t k = key_of(__float_as_uint(score), false);
    return k > key || (k == key && position <= last);
  }
};

__device__ bool is_active(const MomentumEntry& entry, const Threshold& threshold, float w, float g,
                          int64_t at) {
  if (!entry.ranked) return true;
  if (!entry.row_scores) return threshold.below(__fmul_rn(g, w), entry.first + at);
  const int64_t row = at / entry.row_elements;
  return threshold.below(__ldg(entry.row_scores + row), entry.first + row);
}

// Changes w and z of one element.
__device__ void move(const MomentumEntry& entry, const Threshold& threshold, int64_t at, float g,
                     float& w, float& z) {
  const float reached = is_active(entry, threshold, w, g, at) ? g : 0.0f;
  z = __fadd_rn(__fadd_rn(__fmul_rn(entry.beta, z), __fmul_rn(entry.decay, w)), reached);
  w = __fsub_rn(w, __fmul_rn(entry.lr, z));
}

template <class E>
__device__ void step(const MomentumEntry& entry, const Threshold& threshold, const Chunk& chunk) {
  using Raw = typename E::Raw;
  constexpr int kSize = kVectorSize<E>;
  auto* weight = static_cast<Raw*>(entry.weight);
  const auto* grad = static_cast<const Raw*>(entry.grad);
  auto* momentum = static_cast<Raw*>(entry.momentum);
  const int64_t whole = chunk.end & -int64_t{kSize};
  for (int64_t at = chunk.begin + int64_t{threadIdx.x} * kSize; at < whole;
       at += kThreads * kSize) {
    Vector<E, kSize> w, z, g;
    load_own(w, weight + at, entry.aligned);
    load_own(z, momentum + at, entry.aligned);
    if (entry.aligned) {
      g.load_aligned(grad + at);
    } else {
      g.load_elements(grad + at);
    }
    float ws[kSize], zs[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      ws[i] = w[i];
      zs[i] = z[i];
      move(entry, threshold, at + i, g[i], ws[i], zs[i]);
    }
    store<E>(weight + at, ws, entry.aligned);
    store<E>(momentum + at, zs, entry.aligned);
  }
  const int64_t at = max(whole, chunk.begin) + threadIdx.x;
  if (at < chunk.end) {
    float w = E::widen(weight[at]), z = E::widen(momentum[at]);
    move(entry, threshold, at, load_element<E>(grad, at), w, z);
    weight[at] = narrow<E>(w);
    momentum[at] = narrow<E>(z);
  }
}

__global__ void __launch_bounds__(kThreads)
    momentum_kernel(const __grid_constant__ ListTable<MomentumEntry> table,
                    const int64_t* threshold) {
  if (threshold[2] != 0) return;  // broken
  const MomentumEntry& entry = table.find(blockIdx.x, &MomentumEntry::first_block);
  with_element(static_cast<DType>(entry.dtype), [&](auto element) {
    step<decltype(element)>(entry, {threshold[0], threshold[1]}, Chunk(entry));
  });
}

}  // namespace

void sparse_momentum_cuda(const SparseMomentumArgs& call, const Allocate&, void* stream) {
  std::vector<MomentumEntry> entries;
  entries.reserve(call.items.size());
  for (const MomentumItem& item : call.items) {
    MomentumEntry entry = {};
    entry.weight = item.weight;
    entry.grad = item.grad;
    entry.momentum = item.momentum;
    entry.row_scores = static_cast<const float*>(item.row_scores);
    entry.elements = item.elements;
    entry.row_elements = item.row_elements;
    entry.first = item.first;
    entry.lr = static_cast<float>(item.lr);
    entry.decay = static_cast<float>(item.decay);
    entry.beta = static_cast<float>(item.beta);
    entry.dtype = static_cast<uint8_t>(item.dtype);
    entry.ranked = item.ranked;
    entry.aligned = is_aligned(item.weight, item.grad, item.momentum);
    entries.push_back(entry);
  }
  for_launches(entries, [&](const auto& table, int64_t blocks, int64_t) {
    launch("sparse_momentum", static_cast<cudaStream_t>(stream), blocks, momentum_kernel, table,
           static_cast<const int64_t*>(call.table));
  });
}

}  // namespace tk
