#include "common/ops.h"
#include "cuda/task_launch.cuh"

namespace tk {
namespace {

struct GateGradients {
  static constexpr const char* kName = "gate_gradients";
  static constexpr int kSums = 1;
  static constexpr bool kRows = false;
  static constexpr Operand kOperand = Operand::channel_bias;
  static constexpr bool kList = false;

  static __device__ void add(float (&sums)[kSums], float y, float dy, float bias) {
    sums[0] = __fmaf_rn(__fsub_rn(y, bias), dy, sums[0]);
  }
};

// Contiguous positions are rows to sum; else an example is a group whose columns are the channels.
std::vector<Task> make_tasks(const GateGradientsArgs& args) {
  if (args.batch * args.outer * args.channels * args.inner == 0) return {};
  Task task = {};
  set_inputs(task, args.output, args.grad_output, args.dtype);
  task.c = args.bias;
  if (args.outer == 1) {
    task.rows = args.batch * args.channels;
    task.columns = args.inner;
    task.run = args.channels;
    task.row_out = static_cast<float*>(args.out);
    plan_rows(task);
  } else {
    task.groups = static_cast<uint32_t>(args.batch);
    task.rows = args.outer;
    task.columns = args.channels;
    task.run = args.inner;
    task.col_out = static_cast<float*>(args.out);
    plan_matrix(task);
  }
  return {task};
}

// Vectors of each tensor that a thread takes of a flat product.
constexpr int kFlatVectors = 2;

// Of single positions, as of [N, C], nothing is summed: all channels of all examples are one flat
// product, whose vectors end where they do.
template <class E>
__device__ void multiply(const GateGradientsArgs& args, bool aligned) {
  using Raw = typename E::Raw;
  constexpr int kSize = kVectorSize<E>;
  constexpr int kBlock = kThreads * kSize;
  const auto channels = static_cast<uint32_t>(args.channels);
  const int64_t elements = args.batch * args.channels;
  const int64_t whole = elements & -int64_t{kSize};
  const int64_t first = int64_t{blockIdx.x} * kFlatVectors * kBlock + threadIdx.x * kSize;
  const auto* y = static_cast<const Raw*>(args.output);
  const auto* dy = static_cast<const Raw*>(args.grad_output);
  auto* out = static_cast<float*>(args.out);
  const auto bias_of = [&](uint32_t channel) {
    return args.bias ? load_element<E>(args.bias, channel) : 0.0f;
  };

  const Raw* const from[2] = {y + first, dy + first};
  Vector<E, kSize> vectors[kFlatVectors][2];
  load_vectors<E>(vectors, from, kBlock, whole - first, aligned, std::make_index_sequence<2>());
#pragma unroll
  for (int i = 0; i < kFlatVectors; ++i) {
    const int64_t at = first + i * kBlock;
    if (at >= whole) break;
    auto channel = static_cast<uint32_t>(at - quotient(at, args.channels) * args.channels);
    float products[kSize][1] = {};
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      GateGradients::add(products[j], vectors[i][0][j], vectors[i][1][j], bias_of(channel));
      if (++channel == channels) channel = 0;
    }
#pragma unroll
    for (int j = 0; j < kSize; j += 4) {
      if (aligned) {
        *reinterpret_cast<float4*>(out + at + j) =
            make_float4(products[j][0], products[j + 1][0], products[j + 2][0], products[j + 3][0]);
      } else {
        for (int k = j; k < j + 4; ++k) out[at + k] = products[k][0];
      }
    }
  }
  const int64_t at = whole + threadIdx.x;
  if (blockIdx.x == 0 && at < elements) {
    float product[1] = {};
    GateGradients::add(product, load_element<E>(y, at), load_element<E>(dy, at),
                       bias_of(static_cast<uint32_t>(at % args.channels)));
    out[at] = product[0];
  }
}

__global__ void __launch_bounds__(kThreads)
    flat_kernel(const __grid_constant__ GateGradientsArgs args, bool aligned) {
  with_element(args.dtype, [&](auto element) { multiply<decltype(element)>(args, aligned); });
}

void run_flat(const GateGradientsArgs& args, cudaStream_t stream) {
  const int64_t vector = kVectorBytes / size_of(args.dtype);
  const int64_t vectors = divide_up(args.batch * args.channels, vector);
  const auto addresses = reinterpret_cast<uintptr_t>(args.output) |
                         reinterpret_cast<uintptr_t>(args.grad_output) |
                         reinterpret_cast<uintptr_t>(args.out);
  launch(GateGradients::kName, stream, divide_up(vectors, kFlatVectors * kThreads), flat_kernel,
         args, addresses % kVectorBytes == 0);
}

}  // namespace

void gate_gradients_cuda(const GateGradientsArgs& args, const Allocate& allocate, void* stream) {
  if (args.batch * args.channels > 0 && args.outer == 1 && args.inner == 1) {
    return run_flat(args, static_cast<cudaStream_t>(stream));
  }
  run_tasks(GateGradients(), make_tasks(args), allocate, stream);
}

}  // namespace tk
