// Between the hosts that cut the work and the kernels that do it: one launch function a kernel,
// each instantiated in a file of its own under inst/.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace osf {

enum class Math {
  bf16,    // bf16 factors
  f16,     // fp16 factors
  tf32,    // float32 factors rounded to 11 significant bits
  tf32x3,  // float32 factors in two tf32 pieces each: three products, float32 accuracy
};

// The work of one block, which the hosts cut by and the kernels are compiled for.
struct CoefficientsShape {
  int rows, columns, rank;
};
constexpr CoefficientsShape coefficients_shape(bool half_precision, int rank) {
  if (!half_precision) return {128, 32, 64};
  return rank <= 64 ? CoefficientsShape{256, 64, 64} : CoefficientsShape{256, 32, 128};
}
constexpr int kUpdateRows = 128, kUpdateColumns = 128;
constexpr int kSumQuads = 256;  // groups of four elements of a unit of sums, one a thread

// Shared memory of one matrix. Cholesky: the packed upper triangle. Jacobi: the columns, the right
// singular vectors where they fit beside them, and two numbers a column.
constexpr int64_t cholesky_shared_bytes(int64_t l) { return l * (l + 1) / 2 * 4; }
constexpr int64_t jacobi_shared_bytes(int64_t p, int64_t l, bool shared_v) {
  return (p * l + (shared_v ? l * l : 0) + 2 * l) * 4;
}
constexpr int kCholeskyThreads = 512, kJacobiThreads = 1024;  // at most

template <Math math, int RANK>
void launch_coefficients(const Params<CoefficientsProblem>& params, int multiprocessors,
                         cudaStream_t stream);
template <Math math>
void launch_update(const Params<UpdateProblem>& params, int multiprocessors, cudaStream_t stream);
void launch_cholesky(const CholeskyParams& params, int blocks, int threads, cudaStream_t stream);
template <bool SHARED_V>
void launch_jacobi(const JacobiParams& params, int blocks, int threads, cudaStream_t stream);

}  // namespace osf
