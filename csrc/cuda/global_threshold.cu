// global_threshold (common/global_threshold.h). All counts are integers, so that the order of
// blocks changes nothing. The host waits for nothing: what a pass has found is read by the next one
// from the workspace, and a pass that is not needed ends at once.
#include "common/global_threshold.h"
#include "common/ops.h"
#include "cuda/list_launch.cuh"

namespace tk {
namespace {

using Count = unsigned long long;  // what atomics take

constexpr const char* kName = "global_threshold";
constexpr int kBinsEach = kBins / kThreads;  // that a thread adds up
constexpr int kGroup = 16;                   // of threads, whose sums are added up again

struct ScoreEntry {
  const void* a;
  const void* b;
  int64_t elements;
  int64_t first;  // position of its first element
  uint32_t first_block;
  uint32_t rank;  // its place, counted from the end of the list
  uint8_t dtype;
  bool ranked;
  bool aligned;
};

// The search, in the workspace; behind it stand the ties of each block.
struct Search {
  Count bins[kDigits][kBins];
  Count broken;
  int64_t left;  // how many of the scores with the digits of `prefix` are among the `wanted`
  int64_t ties;  // scores with these digits
  uint32_t prefix;

  __device__ bool ends_in_ties() const { return left < ties; }
};

__device__ uint32_t score_key(float score, bool is_signed) {
  // -0 becomes 0.
  return key_of(__float_as_uint(is_signed ? __fadd_rn(score, 0.0f) : score), is_signed);
}

// Calls use(score, element) for all elements of a chunk, each in one of the block's threads.
template <class E, class Use>
__device__ void for_scores(const ScoreEntry& entry, const Chunk& chunk, const Use& use) {
  using Raw = typename E::Raw;
  constexpr int kSize = kVectorSize<E>, kBlock = kThreads * kSize, kAtOnce = 4;
  const auto* a = static_cast<const Raw*>(entry.a);
  const auto* b = static_cast<const Raw*>(entry.b);
  const bool product = b && entry.ranked;
  if (!product) a = b = b ? b : a;
  const int64_t whole = chunk.end & -int64_t{kSize};
  for (int64_t at = chunk.begin + int64_t{threadIdx.x} * kSize; at < whole;
       at += kAtOnce * kBlock) {
    const Raw* const from[2] = {a + at, b + at};
    Vector<E, kSize> vectors[kAtOnce][2];
    load_vectors<E>(vectors, from, kBlock, whole - at, entry.aligned,
                    std::make_index_sequence<2>());
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (at + i * kBlock >= whole) break;
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float score =
            product ? __fmul_rn(vectors[i][1][j], vectors[i][0][j]) : vectors[i][0][j];
        use(score, at + i * kBlock + j);
      }
    }
  }
  const int64_t at = max(whole, chunk.begin) + threadIdx.x;
  if (at < chunk.end) {
    const float score = load_element<E>(a, at);
    use(product ? __fmul_rn(load_element<E>(b, at), score) : score, at);
  }
}

__global__ void __launch_bounds__(kThreads) begin_kernel(Search* search, int64_t count) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  search->bins[i / kBins][i % kBins] = 0;
  if (i == 0) {
    search->broken = 0;
    search->left = count;
    search->prefix = 0;
  }
}

// How many of the scores that have the digits that are known have which next digit.
__global__ void __launch_bounds__(kThreads)
    digit_kernel(const __grid_constant__ ListTable<ScoreEntry> table, Search* search, int digit,
                 bool is_signed) {
  __shared__ uint32_t counts[kBins];
  const ScoreEntry& entry = table.find(blockIdx.x, &ScoreEntry::first_block);
  if (digit > 0 && !entry.ranked) return;
  for (int i = threadIdx.x; i < kBins; i += kThreads) counts[i] = 0;
  __syncthreads();
  const uint32_t prefix = search->prefix, above = prefix_mask(digit);
  const int shift = digit_shift(digit);
  bool broken = false;
  with_element(static_cast<DType>(entry.dtype), [&](auto element) {
    for_scores<decltype(element)>(entry, Chunk(entry), [&](float score, int64_t) {
      broken |= key_of(__float_as_uint(score), false) >= kInfinity;
      const uint32_t key = score_key(score, is_signed);
      if (entry.ranked && (key & above) == prefix) {
        atomicAdd(&counts[key >> shift & digit_mask(digit)], 1u);
      }
    });
  });
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += kThreads) {
    if (counts[i]) atomicAdd(&search->bins[digit][i], Count{counts[i]});
  }
  if (broken && digit == 0) atomicMax(&search->broken, Count{entry.rank});
}

// Of numbers that a group of threads holds, the one down from the last that `left` runs out in.
template <class Number>
__device__ int fall(const Number* numbers, int count, int64_t& left) {
  int i = count - 1;
  while (i > 0 && left > static_cast<int64_t>(numbers[i])) left -= numbers[i--];
  return i;
}

// One block: the next digit of the key, the greatest that is not too great.
__global__ void __launch_bounds__(kThreads) pick_kernel(Search* search, int digit, int64_t* table) {
  __shared__ Count sums[kThreads], group_sums[kThreads / kGroup];
  const Count* bins = search->bins[digit];
  Count sum = 0;
  for (int i = 0; i < kBinsEach; ++i) sum += bins[threadIdx.x * kBinsEach + i];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x < kThreads / kGroup) {
    sum = 0;
    for (int i = 0; i < kGroup; ++i) sum += sums[threadIdx.x * kGroup + i];
    group_sums[threadIdx.x] = sum;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  int64_t left = search->left;
  int at = fall(group_sums, kThreads / kGroup, left) * kGroup;
  at = (at + fall(sums + at, kGroup, left)) * kBinsEach;
  at += fall(bins + at, kBinsEach, left);
  search->left = left;
  search->ties = static_cast<int64_t>(bins[at]);
  search->prefix |= static_cast<uint32_t>(at) << digit_shift(digit);
  table[0] = search->prefix;
  table[1] = INT64_MAX;
  table[2] = static_cast<int64_t>(search->broken);
}

// How many of each block's scores are equal to the last of the `wanted`.
__global__ void __launch_bounds__(kThreads)
    ties_kernel(const __grid_constant__ ListTable<ScoreEntry> table, const Search* search,
                uint32_t* ties, bool is_signed) {
  if (!search->ends_in_ties()) return;
  __shared__ uint32_t found;
  if (threadIdx.x == 0) found = 0;
  __syncthreads();
  const ScoreEntry& entry = table.find(blockIdx.x, &ScoreEntry::first_block);
  if (entry.ranked) {
    uint32_t mine = 0;
    with_element(static_cast<DType>(entry.dtype), [&](auto element) {
      for_scores<decltype(element)>(entry, Chunk(entry), [&](float score, int64_t) {
        mine += score_key(score, is_signed) == search->prefix;
      });
    });
    if (mine) atomicAdd(&found, mine);
  }
  __syncthreads();
  if (threadIdx.x == 0) ties[blockIdx.x] = found;
}

// Where thread 0 stops: the first of the threads' numbers in which `left` runs out. All threads
// call it; those after it are told.
__device__ int rise(Count mine, int64_t& left) {
  __shared__ Count numbers[kThreads];
  __shared__ int at;
  __shared__ int64_t rest;
  numbers[threadIdx.x] = mine;
  __syncthreads();
  if (threadIdx.x == 0) {
    rest = left;
    for (at = 0; at < kThreads - 1 && rest > static_cast<int64_t>(numbers[at]); ++at) {
      rest -= numbers[at];
    }
  }
  __syncthreads();
  left = rest;
  const int found = at;
  __syncthreads();
  return found;
}

// One block: the position of the last of the equal scores that are among the `wanted`, if it lies
// in a block from `first` on of those of this table. `ties` are those of all `blocks`.
__global__ void __launch_bounds__(kThreads)
    locate_kernel(const __grid_constant__ ListTable<ScoreEntry> table, const Search* search,
                  const uint32_t* ties, int64_t blocks, int64_t first, bool is_signed,
                  int64_t* out) {
  if (!search->ends_in_ties()) return;
  int64_t left = search->left;
  const int64_t each = divide_up(blocks, kThreads);
  const int64_t begin = min(threadIdx.x * each, blocks), end = min(begin + each, blocks);
  Count sum = 0;
  for (int64_t i = begin; i < end; ++i) sum += ties[i];
  int64_t block = rise(sum, left) * each;
  while (left > ties[block]) left -= ties[block++];

  const ScoreEntry& last = table.tasks[table.count - 1];
  const int64_t mine = last.first_block + divide_up(last.elements, kChunk);
  if (block < first || block >= first + mine) return;
  const auto here = static_cast<uint32_t>(block - first);
  const ScoreEntry& entry = table.find(here, &ScoreEntry::first_block);
  constexpr int kEach = kChunk / kThreads;
  const int64_t from = int64_t{here - entry.first_block} * kChunk + threadIdx.x * kEach;
  with_element(static_cast<DType>(entry.dtype), [&](auto element) {
    using E = decltype(element);
    const auto is_tie = [&](int64_t i) {
      if (i >= entry.elements) return false;
      const float a = load_element<E>(entry.a, i);
      const float score = entry.b ? __fmul_rn(load_element<E>(entry.b, i), a) : a;
      return score_key(score, is_signed) == search->prefix;
    };
    Count found = 0;
    for (int64_t i = from; i < from + kEach; ++i) found += is_tie(i);
    if (rise(found, left) != static_cast<int>(threadIdx.x)) return;
    int64_t at = from;
    for (;; ++at) {
      if (is_tie(at) && --left == 0) break;
    }
    *out = entry.first + at;
  });
}

std::vector<ScoreEntry> make_entries(const std::vector<ScoreItem>& items) {
  std::vector<ScoreEntry> entries;
  entries.reserve(items.size());
  int64_t first = 0;
  for (const ScoreItem& item : items) {
    ScoreEntry entry = {};
    entry.a = item.a;
    entry.b = item.b;
    entry.elements = item.elements;
    entry.first = first;
    entry.rank = static_cast<uint32_t>(items.size() - entries.size());
    entry.dtype = static_cast<uint8_t>(item.dtype);
    entry.ranked = item.ranked;
    entry.aligned = is_aligned(item.a, item.b, nullptr);
    entries.push_back(entry);
    if (item.ranked) first += item.elements;
  }
  return entries;
}

}  // namespace

void global_threshold_cuda(const GlobalThresholdArgs& call, const Allocate& allocate,
                           void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const auto entries = make_entries(call.items);
  const int64_t all_blocks = blocks_of(entries);
  auto* search = static_cast<Search*>(
      allocate(int64_t{sizeof(Search)} + all_blocks * int64_t{sizeof(uint32_t)}));
  auto* ties = reinterpret_cast<uint32_t*>(search + 1);
  auto* table_out = static_cast<int64_t*>(call.table);

  launch(kName, stream, kDigits * kBins / kThreads, begin_kernel, search, call.wanted);
  for (int digit = 0; digit < kDigits; ++digit) {
    for_launches(entries, [&](const auto& table, int64_t blocks, int64_t) {
      launch(kName, stream, blocks, digit_kernel, table, search, digit, call.is_signed);
    });
    launch(kName, stream, 1, pick_kernel, search, digit, table_out);
  }
  for_launches(entries, [&](const auto& table, int64_t blocks, int64_t before) {
    launch(kName, stream, blocks, ties_kernel, table, static_cast<const Search*>(search),
           ties + before, call.is_signed);
  });
  for_launches(entries, [&](const auto& table, int64_t, int64_t before) {
    launch(kName, stream, 1, locate_kernel, table, static_cast<const Search*>(search),
           static_cast<const uint32_t*>(ties), all_blocks, before, call.is_signed, table_out + 1);
  });
}

}  // namespace tk
