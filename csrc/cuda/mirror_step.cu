// mirror_step on a GPU: a launch for each rule that a list has, a thread for four elements.
#include <algorithm>
#include <vector>

#include "common/mirror_step.h"
#include "common/ops.h"
#include "cuda/list_launch.cuh"
#include "cuda/vector_store.cuh"

namespace tk {
namespace {

constexpr int kEach = 4;  // elements of a thread: 16 bytes of a float tensor

struct MirrorEntry {
  void* param;
  const void* grad;
  float* value;
  float* first;
  float* second;
  int64_t elements;
  MirrorNumbers<float> numbers;
  uint32_t first_block;
  uint8_t dtype;
  uint8_t direction;
  bool rounded;
  bool aligned;  // every tensor and plane starts at a multiple of four elements' bytes
};

struct ScalarMath {
  using V = float;
  static __device__ float splat(double x) { return static_cast<float>(x); }
  static __device__ float exp(float x) { return expf(x); }
  static __device__ float tanh(float x) { return tanhf(x); }
  static __device__ float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
  static __device__ float choose(bool which, float a, float b) { return which ? a : b; }
};

// Four elements of a float tensor at once, or `count` of them one by one.
template <bool kAtOnce>
__device__ void load_floats(float (&to)[kEach], const float* from, int count) {
  if constexpr (kAtOnce) {
    const float4 all = *reinterpret_cast<const float4*>(from);
    to[0] = all.x, to[1] = all.y, to[2] = all.z, to[3] = all.w;
  } else {
#pragma unroll
    for (int i = 0; i < kEach; ++i) to[i] = i < count ? from[i] : 0.0f;
  }
}

template <bool kAtOnce>
__device__ void store_floats(float* to, const float (&from)[kEach], int count) {
  if constexpr (kAtOnce) {
    // Not by `=`: the compiler would join it with the single stores of the other case.
    __stwb(reinterpret_cast<float4*>(to), make_float4(from[0], from[1], from[2], from[3]));
  } else {
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (i < count) to[i] = from[i];
  }
}

// The same of a tensor of type E, and rounded to it.
template <bool kAtOnce, class E>
__device__ void load_elements(float (&to)[kEach], const void* base, int64_t at, int count) {
  using Raw = typename E::Raw;
  const Raw* from = static_cast<const Raw*>(base) + at;
  if constexpr (E::kType == DType::f32) {
    load_floats<kAtOnce>(to, reinterpret_cast<const float*>(from), count);
  } else if constexpr (kAtOnce) {
    const uint2 words = *reinterpret_cast<const uint2*>(from);
    to[0] = E::widen(static_cast<Raw>(words.x)), to[1] = E::widen(static_cast<Raw>(words.x >> 16));
    to[2] = E::widen(static_cast<Raw>(words.y)), to[3] = E::widen(static_cast<Raw>(words.y >> 16));
  } else {
#pragma unroll
    for (int i = 0; i < kEach; ++i) to[i] = i < count ? E::widen(from[i]) : 0.0f;
  }
}

template <bool kAtOnce, class E>
__device__ void store_elements(void* base, int64_t at, const float (&from)[kEach], int count) {
  using Raw = typename E::Raw;
  Raw* to = static_cast<Raw*>(base) + at;
  if constexpr (E::kType == DType::f32) {
    store_floats<kAtOnce>(reinterpret_cast<float*>(to), from, count);
  } else if constexpr (kAtOnce) {
    __stwb(reinterpret_cast<uint2*>(to),
           uint2{narrow<E>(from[0]) | uint32_t{narrow<E>(from[1])} << 16,
                 narrow<E>(from[2]) | uint32_t{narrow<E>(from[3])} << 16});
  } else {
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (i < count) to[i] = narrow<E>(from[i]);
  }
}

// d of a gradient, and the new moments.
__device__ inline float directed(float g, float& first, float& second, Direction direction,
                                 const MirrorNumbers<float>& n) {
  if (direction == Direction::gradient) return g;
  first = n.decay * first + (direction == Direction::adam ? (1 - n.decay) * g : g);
  if (direction == Direction::momentum) return first;
  second = n.decay2 * second + (1 - n.decay2) * g * g;
  return first / (sqrtf(second) + n.eps);
}

template <bool kAtOnce, class Rule, class E>
__device__ void step(const MirrorEntry& entry, int64_t at) {
  using Math = MirrorMath<ScalarMath, Rule>;
  constexpr int kPlanes = Rule::kStored, kMoments = Rule::kMomentPlanes;
  const int count = static_cast<int>(min(entry.elements - at, int64_t{kEach}));
  const auto direction = static_cast<Direction>(entry.direction);
  const MirrorNumbers<float>& n = entry.numbers;

  float v[kPlanes][kEach], first[kMoments][kEach] = {}, second[kMoments][kEach] = {};
  float g[kEach] = {}, w[kEach];
  if constexpr (Rule::kPlanes == 0) {
    load_elements<kAtOnce, E>(v[0], entry.param, at, count);
  } else {
#pragma unroll
    for (int p = 0; p < kPlanes; ++p)
      load_floats<kAtOnce>(v[p], entry.value + p * entry.elements + at, count);
  }
  if (entry.grad) {
    load_elements<kAtOnce, E>(g, entry.grad, at, count);
#pragma unroll
    for (int p = 0; p < kMoments; ++p) {
      const int64_t from = p * entry.elements + at;
      if (direction != Direction::gradient)
        load_floats<kAtOnce>(first[p], entry.first + from, count);
      if (direction == Direction::adam) load_floats<kAtOnce>(second[p], entry.second + from, count);
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    float each[kPlanes];
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) each[p] = v[p][i];
    if (entry.grad)
      Math::move(each, n.scale * g[i], n, [&](float gradient, int p) {
        return directed(gradient, first[p][i], second[p][i], direction, n);
      });
    const auto projected = Math::project(each, n.next_beta);
    w[i] = n.scale * (entry.rounded ? Math::rounded(projected) : projected.x);
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) v[p][i] = each[p];
  }
  if (entry.grad) {
#pragma unroll
    for (int p = 0; p < kMoments; ++p) {
      const int64_t to = p * entry.elements + at;
      if (direction != Direction::gradient)
        store_floats<kAtOnce>(entry.first + to, first[p], count);
      if (direction == Direction::adam) store_floats<kAtOnce>(entry.second + to, second[p], count);
    }
    if constexpr (Rule::kPlanes > 0) {
#pragma unroll
      for (int p = 0; p < kPlanes; ++p)
        store_floats<kAtOnce>(entry.value + p * entry.elements + at, v[p], count);
    }
  }
  store_elements<kAtOnce, E>(entry.param, at, w, count);
}

template <class Rule>
__global__ void __launch_bounds__(kThreads)
    mirror_kernel(const __grid_constant__ ListTable<MirrorEntry> table) {
  const MirrorEntry& entry = table.find(blockIdx.x, &MirrorEntry::first_block);
  const Chunk chunk(entry);
  with_element(static_cast<DType>(entry.dtype), [&](auto element) {
    for (int64_t at = chunk.begin + int64_t{threadIdx.x} * kEach; at < chunk.end;
         at += kThreads * kEach) {
      if (entry.aligned && at + kEach <= chunk.end) {
        step<true, Rule, decltype(element)>(entry, at);
      } else {
        step<false, Rule, decltype(element)>(entry, at);
      }
    }
  });
}

bool starts_at(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

MirrorEntry entry_of(const MirrorItem& item, int planes) {
  MirrorEntry entry = {};
  entry.param = item.param;
  entry.grad = item.grad;
  entry.value = static_cast<float*>(item.value);
  entry.first = static_cast<float*>(item.first);
  entry.second = static_cast<float*>(item.second);
  entry.elements = item.elements;
  entry.numbers = item.numbers<float>();
  entry.dtype = static_cast<uint8_t>(item.dtype);
  entry.direction = static_cast<uint8_t>(item.direction);
  entry.rounded = item.rounded;
  const int64_t own = kEach * size_of(item.dtype), stored = kEach * int64_t{sizeof(float)};
  entry.aligned = starts_at(item.param, own) && starts_at(item.grad, own) &&
                  starts_at(item.value, stored) && starts_at(item.first, stored) &&
                  starts_at(item.second, stored) && (planes < 2 || item.elements % kEach == 0);
  return entry;
}

template <class Rule>
void launch_rule(const std::vector<MirrorEntry>& entries, cudaStream_t stream) {
  for_launches(entries, [&](const auto& table, int64_t blocks, int64_t) {
    launch("mirror_step", stream, blocks, mirror_kernel<Rule>, table);
  });
}

bool same_rule(const MirrorItem& a, const MirrorItem& b) {
  return a.projection == b.projection && a.update == b.update && a.levels == b.levels;
}

}  // namespace

void mirror_step_cuda(const MirrorList& call, const Allocate&, void* stream) {
  std::vector<const MirrorItem*> left;
  for (const MirrorItem& item : call.items) left.push_back(&item);
  while (!left.empty()) {
    const MirrorItem& first = *left.front();
    const auto others = std::stable_partition(
        left.begin(), left.end(), [&](const MirrorItem* item) { return same_rule(*item, first); });
    with_mirror_rule(first.projection, first.update, first.levels, [&](auto rule) {
      using Rule = decltype(rule);
      std::vector<MirrorEntry> entries;
      for (auto item = left.begin(); item != others; ++item)
        entries.push_back(entry_of(**item, Rule::kPlanes));
      launch_rule<Rule>(entries, static_cast<cudaStream_t>(stream));
    });
    left.erase(left.begin(), others);
  }
}

}  // namespace tk
