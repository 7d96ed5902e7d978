#include "common/ops.h"
#include "common/philox.h"
#include "cuda/launch.cuh"
#include "cuda/task_table.h"
#include "cuda/vector_load.cuh"

namespace tk {
namespace {

// What a thread writes: one 16-byte vector, whose signs stand in one word.
template <class E>
__device__ void fill(const Task& task, int64_t vector, uint64_t seed) {
  using Raw = typename E::Raw;
  constexpr int kSize = kVectorSize<E>;
  constexpr int kBits = 8 * sizeof(Raw);
  const int64_t first = vector * kSize;
  if (first >= task.columns) return;
  const uint32_t signs = random_signs_at(seed, task.stream, first);
  auto element = [&](int i) {
    return static_cast<uint32_t>(bits_of_one(E::kType)) | (signs >> i & 1) << (kBits - 1);
  };
  auto* out = reinterpret_cast<Raw*>(task.row_out) + first;
  if (first + kSize <= task.columns) {
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < kSize; ++i) words[i * kBits / 32] |= element(i) << (i * kBits % 32);
    *reinterpret_cast<uint4*>(out) = {words[0], words[1], words[2], words[3]};
  } else {
    for (int i = 0; first + i < task.columns; ++i) out[i] = static_cast<Raw>(element(i));
  }
}

template <int kCapacity>
__global__ void __launch_bounds__(kThreads)
    rademacher_kernel(const __grid_constant__ TaskTable<kCapacity> table, uint64_t seed) {
  const Task& task = table.find(blockIdx.x, &Task::first_block);
  const int64_t vector = int64_t{blockIdx.x - task.first_block} * kThreads + threadIdx.x;
  with_element(static_cast<DType>(task.dtype),
               [&](auto element) { fill<decltype(element)>(task, vector, seed); });
}

}  // namespace

void rademacher_cuda(const RademacherList& call, const Allocate&, void* stream) {
  const auto count = static_cast<int64_t>(call.items.size());
  for (int64_t begin = 0; begin < count;) {
    TaskTable<kLongTable> table;
    int64_t blocks = 0;
    for (table.count = 0; table.count < kLongTable && begin < count; ++begin) {
      const RademacherItem& item = call.items[begin];
      const int64_t more = divide_up(item.elements * size_of(item.dtype), kVectorBytes * kThreads);
      if (table.count > 0 && blocks + more > kMaxBlocks) break;
      Task& task = table.tasks[table.count++] = {};
      task.row_out = static_cast<float*>(item.out);
      task.columns = item.elements;
      task.stream = item.stream;
      task.dtype = static_cast<uint8_t>(item.dtype);
      task.first_block = static_cast<uint32_t>(blocks);
      blocks += more;
    }
    launch("rademacher", static_cast<cudaStream_t>(stream), blocks, rademacher_kernel<kLongTable>,
           table, call.seed);
  }
}

}  // namespace tk
