// PTX instructions of tensor cores, of copies that run on their own and of launches that overlap,
// and shared memory whose size the launch decides. tests/backends/emulation has a file of this name
// that says the same for a CPU.
//
// All of a warp's lanes call those of tensor cores together. A product is 16 filters by 8 columns;
// a step of it takes 32 bytes of either side along the positions: 16 half elements, or 8 of TF32.
#pragma once

#include <cstdint>

namespace tk {

__device__ inline char* dynamic_shared() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<char*>(memory);
}

// Lets the kernel after this one take multiprocessors as soon as all blocks of this one have one,
// if it is launched by launch_early(): what it does before wait_for_last_kernel() costs no time.
__device__ inline void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Until the kernel before this one has ended, and what it wrote can be read.
__device__ inline void wait_for_last_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Begins a copy of 16 or 4 bytes to shared memory, aligned to as many on both sides; zeros, and
// nothing is read, where `present` is false. It passes no register, and has landed when a wait says
// so. Those of 16 bytes go past the L1 cache.
template <int kBytes>
__device__ inline void copy_to_shared(char* to, const void* from, bool present) {
  static_assert(kBytes == 16 || kBytes == 4);
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int bytes = present ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
                 "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from),
                 "r"(bytes)
                 : "memory");
  }
}

// Ends a group of the thread's copies, which may be empty.
__device__ inline void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the thread's latest kPending groups have landed. Other threads see them after a
// barrier.
template <int kPending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Has a register hold what else would be computed anew wherever it is used.
__device__ inline void keep(int& value) { asm("" : "+r"(value)); }

#define TK_LOAD_MATRICES(name, instruction)                                              \
  __device__ inline void name(uint32_t (&words)[4], const char* row) {                   \
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));           \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4." instruction " {%0, %1, %2, %3}, [%4];" \
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])        \
                 : "r"(address)                                                          \
                 : "memory");                                                            \
  }
// Four matrices of 8 rows by 16 bytes in shared memory, whose rows the lanes point to: lane l to
// row l % 8 of matrix l / 8. It gets bytes [4·(l % 4), +4) of row l / 4 of each.
TK_LOAD_MATRICES(load_matrices, "shared.b16")
// The same of matrices of 2-byte elements, each transposed on the way.
TK_LOAD_MATRICES(load_matrices_transposed, "trans.shared.b16")
#undef TK_LOAD_MATRICES

// d[f][c] += Σ_p a[f][p] · b[c][p]. Lane l = 4·g + t holds of d, in this order, the elements
// (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1); of a and b what load_matrices gives it of
// rows 0-7, 8-15, then again 16 bytes on, and of 8 rows, then again 16 bytes on.
#define TK_MMA(name, instruction)                                                                 \
  __device__ inline void name(float& d0, float& d1, float& d2, float& d3, const uint32_t (&a)[4], \
                              uint32_t b0, uint32_t b1) {                                         \
    asm("mma.sync.aligned." instruction                                                           \
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                        \
        : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)                                                  \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                          \
  }
TK_MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32")
TK_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
TK_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef TK_MMA

// A float with the 10 bits of fraction that mma_tf32 reads, rounded to nearest.
__device__ inline uint32_t round_to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

}  // namespace tk
