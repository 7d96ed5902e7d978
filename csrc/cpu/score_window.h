// A narrow window of keys that the last of the `wanted` scores lies in, found from a sample, so
// that one read of all elements is enough: it counts the keys above the window and keeps those
// within (Floyd and Rivest 1975). The answer is exact: where the window missed, it says so.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "common/global_threshold.h"
#include "cpu/item_tasks.h"
#include "cpu/parallel.h"
#include "cpu/score_keys.h"

namespace tk {
inline namespace TK_ISA {

constexpr int64_t kWindowElements = 1 << 22;  // below it, three reads are from the cache anyway
constexpr int64_t kSampled = 1 << 19;         // elements, however many there are
constexpr int64_t kWindowShare = 128;         // of all elements one in so many fits the window
// Ranks of the sample between its estimate and either bound: a quarter of a percent, which is four
// standard deviations of a sample of independent scores. The bounds are edges of bins of 2^15 keys
// (0.4% of a score), by which the window grows to about 0.7% of all elements.
constexpr int64_t kMargin = kSampled / 400;
constexpr int kBinBits = 15;
constexpr int64_t kSampleBins = int64_t{1} << (32 - kBinBits);

// The keys of `signed` scores are numbers without a sign; vectors compare numbers with one.
template <bool kSigned>
constexpr int32_t ordered(uint32_t key) {
  return static_cast<int32_t>(kSigned ? key ^ 0x80000000 : key);
}

template <bool kSigned>
inline KeyBits ordered_keys(Floats scores) {
  return kSigned ? keys<kSigned>(scores) ^ INT32_MIN : keys<kSigned>(scores);
}

struct ScoreWindow {
  uint32_t first, last;  // keys, both within
};

// Of each block of as many registers as one is taken from, the one that a hash names: weights lie
// in periods, which a constant step could meet.
// `bins`, kSampleBins of them, are 0.
template <bool kSigned>
ScoreWindow sampled_window(const GlobalThresholdArgs& call, int64_t ranked, uint32_t* bins) {
  const int64_t block = ranked / kSampled * kKeyLanes;
  int64_t sampled = 0;
  uint64_t number = 0;
  for (const ScoreItem& item : call.items) {
    if (!item.ranked) continue;
    for (int64_t begin = 0; begin < item.elements; begin += block) {
      const uint64_t hash = ++number * 0x9e3779b97f4a7c15u >> 32;
      const int64_t at = begin + static_cast<int64_t>(hash % (block / kKeyLanes)) * kKeyLanes;
      if (at + kKeyLanes > item.elements) continue;
      for_scores(item, at, at + kKeyLanes, [&](Floats score, int64_t) {
        const KeyBits key = keys<kSigned>(score);
        for (int lane = 0; lane < kKeyLanes; ++lane)
          ++bins[static_cast<uint32_t>(key[lane]) >> kBinBits];
      });
      sampled += kKeyLanes;
    }
  }
  const double rank = static_cast<double>(call.wanted) / ranked * sampled;
  ScoreWindow window{0, kSigned ? UINT32_MAX : uint32_t{INT32_MAX}};
  int64_t above = 0;
  for (int64_t bin = kSampleBins - 1; bin >= 0; --bin) {
    const auto edge = static_cast<uint32_t>(bin << kBinBits);
    if (above < rank - kMargin) window.last = edge | ((1u << kBinBits) - 1);
    if ((above += bins[bin]) >= rank + kMargin) {
      window.first = edge;
      break;
    }
  }
  return window;
}

// What all threads have found.
struct WindowCounts {
  std::vector<uint32_t> keys;      // within the window, in any order
  std::atomic<int64_t> within{0};  // more of them than `keys` holds: they did not fit
  std::atomic<int64_t> above{0};
  std::atomic<int64_t> broken{0};
};

template <bool kSigned>
struct WindowPass : IndependentTasks {
  static constexpr int64_t kKept = 4096;

  const GlobalThresholdArgs& call;
  const ItemTasks& tasks;
  const ScoreWindow window;
  WindowCounts& found;
  uint32_t kept[kKept + kKeyLanes];  // not yet among those of all threads
  int64_t count = 0;

  WindowPass(const GlobalThresholdArgs& call, const ItemTasks& tasks, ScoreWindow window,
             WindowCounts& found)
      : call(call), tasks(tasks), window(window), found(found) {}

  void run(int64_t task) {
    const auto [i, begin, end] = tasks.part(task, call.items);
    const ScoreItem& item = call.items[i];
    const KeyBits first = KeyBits{} + ordered<kSigned>(window.first);
    const KeyBits last = KeyBits{} + ordered<kSigned>(window.last);
    const int64_t ranked = item.ranked ? kKeyLanes : 0;
    KeyBits not_finite{}, above{};
    for_scores(item, begin, end, [&](Floats score, int64_t n) {
      const KeyBits key = ordered_keys<kSigned>(score);
      KeyBits broken = magnitudes(score) >= static_cast<int32_t>(kInfinity);
      KeyBits beyond = key > last, from = key >= first;
      if (std::min(n, ranked) < kKeyLanes) {
        broken = keep_first(broken, n);
        beyond = keep_first(beyond, std::min(n, ranked));
        from = keep_first(from, std::min(n, ranked));
      }
      not_finite |= broken;
      above -= beyond;
      if (const uint32_t within = set_lanes(from & ~beyond)) keep(key, within);
    });
    int64_t sum = 0;
    for (int lane = 0; lane < kKeyLanes; ++lane) sum += above[lane];
    found.above += sum;
    hand_over();
    if (!set_lanes(not_finite)) return;
    const int64_t from_end = call.items.size() - i;
    for (int64_t seen = found.broken; seen < from_end;)
      if (found.broken.compare_exchange_weak(seen, from_end)) break;
  }

 private:
  void keep(KeyBits key, uint32_t lanes) {
    const KeyBits bits = kSigned ? key ^ INT32_MIN : key;
#if defined(__AVX512F__)
    const auto packed = _mm512_maskz_compress_epi32(lanes, reinterpret_cast<__m512i>(bits));
    _mm512_storeu_si512(kept + count, packed);
    count += __builtin_popcount(lanes);
#else
    uint32_t each[kKeyLanes];
    std::memcpy(each, &bits, sizeof(bits));
    for (; lanes; lanes &= lanes - 1) kept[count++] = each[__builtin_ctz(lanes)];
#endif
    if (count >= kKept) hand_over();
  }

  void hand_over() {
    const int64_t at = found.within.fetch_add(count);
    if (at + count <= static_cast<int64_t>(found.keys.size()))
      std::copy_n(kept, count, found.keys.begin() + at);
    count = 0;
  }
};

// The key of the last score, or that the window missed it.
struct LastKey {
  bool known;
  uint32_t key;
  int64_t left;  // how many of the scores with this key are among the `wanted`
  int64_t ties;  // scores with this key
  int64_t broken;
};

template <bool kSigned>
LastKey last_by_window(const GlobalThresholdArgs& call, const ItemTasks& tasks, int64_t ranked,
                       int threads) {
  WindowCounts found;
  // The bins lie where the keys will: a step of GSM has no more than that beside its tensors.
  found.keys.resize(std::max(ranked / kWindowShare, kSampleBins));
  const ScoreWindow window = sampled_window<kSigned>(call, ranked, found.keys.data());
  ordered_tasks(tasks.count(), threads,
                [&] { return WindowPass<kSigned>(call, tasks, window, found); });
  const int64_t rank = call.wanted - found.above, within = found.within;
  if (within > static_cast<int64_t>(found.keys.size()) || rank < 1 || rank > within) return {};
  const auto begin = found.keys.begin(), end = begin + within;
  std::nth_element(begin, begin + (rank - 1), end, std::greater<>());
  const uint32_t key = begin[rank - 1];
  const int64_t greater = std::count_if(begin, end, [&](uint32_t each) { return each > key; });
  return {true, key, rank - greater, std::count(begin, end, key), found.broken};
}

}  // namespace TK_ISA
}  // namespace tk
