// The CPU kernel of global_threshold (common/global_threshold.h). Compiled once per instruction set
// (TK_ISA); cpu/dispatch.cpp picks one at run time.
//
// Each digit of the key takes a pass that counts, in a table of each thread, how many scores have
// which digit behind the digits that are known. All counts are integers, so that threads and their
// order change nothing. Only if some of the scores that are equal to the last are left out does a
// fourth pass count them by tasks, to find where they end. Of many elements a sample tells where
// the last is, and then one pass takes the place of the three (score_window.h), unless it has
// missed.
#include "common/global_threshold.h"

#include <atomic>
#include <memory>
#include <utility>

#include "cpu/item_tasks.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/score_keys.h"
#include "cpu/score_window.h"

namespace tk {
inline namespace TK_ISA {
namespace {

constexpr int64_t kTaskElements = 1 << 16;
constexpr int64_t kThreadElements = 1 << 17;  // below it, a second thread costs more than it saves
constexpr int kCopies = 4;  // of a bin: a count that was just written can be read again only later

// What one thread has counted in a pass.
struct Counts {
  int64_t whole[kBins] = {};
  uint32_t part[kBins * kCopies] = {};  // not yet in `whole`
  int64_t elements = 0;                 // in `part`
  int64_t broken = 0;

  void add_up() {
    for (int i = 0; i < kBins * kCopies; ++i) whole[i / kCopies] += part[i];
    std::fill_n(part, kBins * kCopies, 0u);
    elements = 0;
  }
};

template <int kDigit, bool kSigned>
struct Pass : IndependentTasks {
  const GlobalThresholdArgs& call;
  const ItemTasks& tasks;
  Counts& counts;
  uint32_t prefix;

  Pass(const GlobalThresholdArgs& call, const ItemTasks& tasks, Counts& counts, uint32_t prefix)
      : call(call), tasks(tasks), counts(counts), prefix(prefix) {}

  void run(int64_t task) {
    const auto [i, begin, end] = tasks.part(task, call.items);
    const ScoreItem& item = call.items[i];
    if (kDigit > 0 && !item.ranked) return;
    if ((counts.elements += end - begin) > INT32_MAX) counts.add_up();
    KeyBits not_finite{};
    for_scores(item, begin, end, [&](Floats score, int64_t n) {
      if constexpr (kDigit == 0) not_finite |= keep_first(magnitudes(score), n) >= kInfinityBits;
      if (item.ranked) count(keys<kSigned>(score), n);
    });
    if (kDigit == 0 && set_lanes(not_finite))
      counts.broken = std::max<int64_t>(counts.broken, call.items.size() - i);
  }

 private:
  static constexpr int32_t kInfinityBits = kInfinity;

  void count(KeyBits key, int64_t n) {
    uint32_t bits[kKeyLanes];
    std::memcpy(bits, &key, sizeof(key));
    if constexpr (kDigit == 0) {
      if (n == kKeyLanes)
        for (int lane = 0; lane < kKeyLanes; ++lane) add(bits[lane], lane);
      else
        for (int lane = 0; lane < n; ++lane) add(bits[lane], lane);
    } else {
      const KeyBits mask = KeyBits{} + static_cast<int32_t>(prefix_mask(kDigit));
      uint32_t found = set_lanes((key & mask) == KeyBits{} + static_cast<int32_t>(prefix));
      if (n < kKeyLanes) found &= (1u << n) - 1;
      for (; found; found &= found - 1) {
        const int lane = __builtin_ctz(found);
        add(bits[lane], lane);
      }
    }
  }

  void add(uint32_t key, int lane) {
    const uint32_t digit = key >> digit_shift(kDigit) & digit_mask(kDigit);
    ++counts.part[digit * kCopies + lane % kCopies];
  }
};

// How many keys are equal to the last one, task by task.
template <bool kSigned>
struct Ties : IndependentTasks {
  const GlobalThresholdArgs& call;
  const ItemTasks& tasks;
  std::vector<int64_t>& ties;
  int32_t key;

  Ties(const GlobalThresholdArgs& call, const ItemTasks& tasks, std::vector<int64_t>& ties,
       uint32_t key)
      : call(call), tasks(tasks), ties(ties), key(static_cast<int32_t>(key)) {}

  void run(int64_t task) {
    const auto [i, begin, end] = tasks.part(task, call.items);
    if (!call.items[i].ranked) return;
    int64_t found = 0;
    for_scores(call.items[i], begin, end,
               [&](Floats score, int64_t n) { found += __builtin_popcount(equal(score, n)); });
    ties[task] = found;
  }

  // The element that is the n-th of those in a task, n from 1.
  int64_t locate(int64_t task, int64_t n) const {
    const auto [i, begin, end] = tasks.part(task, call.items);
    int64_t at = begin, last = -1;
    for_scores(call.items[i], begin, end, [&](Floats score, int64_t lanes) {
      for (uint32_t found = equal(score, lanes); found; found &= found - 1)
        if (n-- == 1) last = at + __builtin_ctz(found);
      at += kKeyLanes;
    });
    return last;
  }

 private:
  uint32_t equal(Floats score, int64_t n) const {
    const uint32_t found = set_lanes(keys<kSigned>(score) == KeyBits{} + key);
    return n < kKeyLanes ? found & ((1u << n) - 1) : found;
  }
};

class Search {
  const GlobalThresholdArgs& call_;
  ItemTasks tasks_;
  int threads_;
  int64_t ranked_ = 0;  // elements
  std::unique_ptr<Counts[]> counts_;
  uint32_t prefix_ = 0;  // the digits of the key that are known
  int64_t left_;         // how many of the scores with these digits are among the `wanted`
  int64_t ties_ = 0;     // scores that have all digits that are known
  int64_t broken_ = 0;

 public:
  Search(const GlobalThresholdArgs& call, int threads)
      : call_(call), tasks_(call.items, kTaskElements), left_(call.wanted) {
    int64_t elements = 0;
    for (const ScoreItem& item : call.items) {
      elements += item.elements;
      if (item.ranked) ranked_ += item.elements;
    }
    threads_ = static_cast<int>(std::min<int64_t>(threads, elements / kThreadElements + 1));
  }

  template <bool kSigned>
  void run() {
    if (ranked_ < kWindowElements || !find_by_window<kSigned>()) {
      counts_.reset(new Counts[threads_]);
      find<0, kSigned>();
      find<1, kSigned>();
      find<2, kSigned>();
    }
    auto* table = static_cast<int64_t*>(call_.table);
    table[0] = prefix_;
    table[1] = left_ < ties_ ? position_of_last<kSigned>() : INT64_MAX;
    table[2] = broken_;
  }

 private:
  template <bool kSigned>
  bool find_by_window() {
    const LastKey last = last_by_window<kSigned>(call_, tasks_, ranked_, threads_);
    if (last.known) {
      prefix_ = last.key;
      left_ = last.left;
      ties_ = last.ties;
      broken_ = last.broken;
    }
    return last.known;
  }

  template <int kDigit, bool kSigned>
  void find() {
    std::atomic<int> workers{0};
    ordered_tasks(tasks_.count(), threads_, [&] {
      return Pass<kDigit, kSigned>(call_, tasks_, counts_[workers++], prefix_);
    });
    int64_t totals[kBins] = {};
    for (int i = 0; i < threads_; ++i) {
      counts_[i].add_up();
      for (int bin = 0; bin < kBins; ++bin) totals[bin] += std::exchange(counts_[i].whole[bin], 0);
      broken_ = std::max(broken_, counts_[i].broken);
    }
    int bin = kBins - 1;
    while (left_ > totals[bin]) left_ -= totals[bin--];
    prefix_ |= static_cast<uint32_t>(bin) << digit_shift(kDigit);
    ties_ = totals[bin];
  }

  template <bool kSigned>
  int64_t position_of_last() {
    std::vector<int64_t> ties(tasks_.count());
    auto worker = [&] { return Ties<kSigned>(call_, tasks_, ties, prefix_); };
    ordered_tasks(tasks_.count(), threads_, worker);
    int64_t task = 0;
    while (left_ > ties[task]) left_ -= ties[task++];
    const int64_t item = tasks_.part(task, call_.items).item;
    int64_t position = worker().locate(task, left_);
    for (int64_t i = 0; i < item; ++i)
      if (call_.items[i].ranked) position += call_.items[i].elements;
    return position;
  }
};

}  // namespace

void global_threshold(const GlobalThresholdArgs& call, int threads) {
  Search search(call, threads);
  call.is_signed ? search.run<true>() : search.run<false>();
}

}  // namespace TK_ISA
}  // namespace tk
