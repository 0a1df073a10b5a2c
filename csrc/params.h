// What the kernels receive: arrays of problems, passed by value as one kernel parameter, so that no
// copy to the device precedes a launch and a CUDA graph captures the whole of it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace osf {

// Storage types: the kernels convert through ptx.cuh only.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Values of DType (api.h), as the byte that fits in an Operand.
enum : int8_t { kNone = 0, kBf16 = 1, kF16 = 2, kF32 = 3 };

// A matrix as the loaders see it.
struct Operand {
  const void* data;
  int64_t stride[2];    // elements
  int8_t dtype;         // kNone when absent
  int8_t inner;         // the dimension that is contiguous (1 where none is)
  int8_t vector_bytes;  // widest access along `inner` that every line is aligned to: 16, 8, 4, or
                        // 0 where elements have to be read one by one
};

// One product of `coefficients`, after the host chose its orientation: A is written as one partial
// sum per row block, B as one per split of the columns, and these are added in their order.
struct CoefficientsProblem {
  Operand x;       // (m, n)
  Operand U;       // (m, r), may be absent
  Operand V;       // (n, k)
  float* part_a;   // (row_blocks, r, ld_a)
  float* part_b;   // (splits, m, ld_b)
  void* A;         // (r, n)
  void* B;         // (m, k)
  const float* S;  // null without offsets
  int64_t A_stride[2], B_stride[2], S_stride;
  int m, n, r, k;
  int ld_a, ld_b;
  int row_blocks, splits, tiles_per_split, rank_chunks;
  int a_sums;      // of the units of sums, A's; B's follow
  int unit_begin;  // of this launch's units of products, the first that is this problem's
  int sum_begin;   // of its units of sums
  int8_t A_dtype, B_dtype;
  int8_t A_offset, B_offset;  // whether S is taken off
};

struct UpdateProblem {
  Operand out, x, addend;  // (m, n); x is absent when beta = 0
  Operand L[2];            // (m, rank[i])
  Operand R[2];            // (rank[i], n)
  int rank[2];
  int m, n, column_tiles;
  float alpha, beta;
  int unit_begin;
};

// Inverse Cholesky factors of a batch, one matrix a block.
struct CholeskyParams {
  const float* G;       // (batch, l, l), upper triangle read
  int64_t G_stride[3];  // elements
  float* inverse;       // (batch, l, l), contiguous
  int32_t* info;        // (batch)
  int l;
};

// Singular value decompositions of a batch, one matrix a block.
struct JacobiParams {
  const float* M;       // (batch, p, l)
  int64_t M_stride[3];  // elements
  float* Ut;            // (batch, l, p): one left singular vector a line
  float* S;             // (batch, l)
  float* Vt;            // (batch, l, l): one right singular vector a line
  int32_t* info;        // (batch)
  int p, l;
  double tolerance2;  // square of the cosine below which two columns are orthogonal
};

// CUDA 12.1 raised the limit on kernel parameters from 4 KB.
#if CUDART_VERSION >= 12010
constexpr size_t kParameterBytes = 32764;
#else
constexpr size_t kParameterBytes = 4096;
#endif

template <class Problem>
struct Params {
  static constexpr int kCapacity = static_cast<int>((kParameterBytes - 24) / sizeof(Problem));
  int count;
  int units;
  int sums;       // units of sums that follow those of products
  int* counters;  // of ordered.cuh, for problems with sums
  Problem problem[kCapacity];
};

static_assert(sizeof(Params<CoefficientsProblem>) <= kParameterBytes, "kernel parameter");
static_assert(sizeof(Params<UpdateProblem>) <= kParameterBytes, "kernel parameter");

}  // namespace osf
