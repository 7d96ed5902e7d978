// What the kernels ask of an nvcc, a host compiler and a GPU: C++17, 32 KB of parameters, bfloat16
// on tensor cores (sm_80), the static runtime.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

struct Table {
  int values[8000];
};

template <int kStep>
__global__ void kernel(const __grid_constant__ Table table, float* out) {
  unsigned a[4] = {}, b[2] = {};
  float d[4] = {};
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  if constexpr (kStep > 0) out[threadIdx.x] = d[0] + table.values[threadIdx.x * kStep];
}

int main() {
  kernel<2><<<1, 32>>>(Table(), nullptr);
  return cudaGetLastError() != cudaSuccess;
}
