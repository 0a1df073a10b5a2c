// The library's host interface: plain structs of pointers, sizes and strides, and a call each.
//
// The structs are also the wire format: Python packs them as little-endian 8-byte fields in this
// order (osf_kernels/backends/cuda.py), so every member is exactly 8 bytes wide.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace osf {

enum class DType : int64_t { none = 0, bf16 = 1, f16 = 2, f32 = 3 };

// A matrix of any strides (in elements). Absent when its dtype is none.
struct MatrixRef {
  void* data;
  int64_t stride0;
  int64_t stride1;
  DType dtype;

  bool present() const { return dtype != DType::none; }
};

// A = Uᵀ x (r, n) and B = x V (m, k); with S also B −= U diag(S), and as root A −= diag(S) Vᵀ.
struct CoefficientsJob {
  int64_t m, n, r, k;
  MatrixRef x;  // (m, n)
  MatrixRef U;  // (m, r), absent together with A
  MatrixRef V;  // (n, k), absent together with B
  MatrixRef A;  // (r, n)
  MatrixRef B;  // (m, k)
  const float* S;
  int64_t S_stride;
  int64_t root;  // 0 or 1
};

// out = beta·x + alpha·(L1 R1 + L2 R2) + addend; beta = 0 never reads x. out may be x.
struct UpdateJob {
  int64_t m, n, r, k;
  MatrixRef out;     // (m, n)
  MatrixRef x;       // (m, n)
  MatrixRef addend;  // (m, n), may be absent
  MatrixRef L1;      // (m, r) basis, absent together with R1
  MatrixRef R1;      // (r, n) coefficient
  MatrixRef L2;      // (m, k) coefficient, absent together with R2
  MatrixRef R2;      // (k, n) basis
  double alpha, beta;
};

// inverse = R⁻¹ of each G = RᵀR, upper triangular with zeros below; reads the upper triangle of G.
struct CholeskyJob {
  int64_t batch, l;
  const float* G;  // (batch, l, l)
  int64_t G_stride[3];
  float* inverse;  // (batch, l, l), contiguous; all NaN where info is not 0
  int32_t* info;   // (batch): 0, or one more than the first pivot that is not positive and finite
};

// M = U diag(S) Vᵀ with S descending, p >= l.
struct JacobiJob {
  int64_t batch, p, l;
  const float* M;  // (batch, p, l)
  int64_t M_stride[3];
  float* Ut;      // (batch, l, p), contiguous: the transpose of U
  float* S;       // (batch, l), contiguous
  float* Vt;      // (batch, l, l), contiguous: the transpose of V
  int32_t* info;  // (batch): 0; the sweeps done where they did not suffice; -1 where M has a NaN or
                  // an Inf, and then all of U, S and V are NaN
};

static_assert(sizeof(MatrixRef) == 4 * 8, "wire format");
static_assert(sizeof(CoefficientsJob) == (4 + 5 * 4 + 3) * 8, "wire format");
static_assert(sizeof(UpdateJob) == (4 + 7 * 4 + 2) * 8, "wire format");
static_assert(sizeof(CholeskyJob) == 8 * 8, "wire format");
static_assert(sizeof(JacobiJob) == 11 * 8, "wire format");

// What the work is cut by, and the shared memory a block may have. The cut never depends on the
// other jobs of a list, so a matrix has the same bits alone and in a list.
struct Machine {
  int multiprocessors;
  int shared_bytes;
};

// Bytes of 16-byte aligned device memory that `coefficients` needs for its partial sums.
int64_t coefficients_workspace_bytes(const CoefficientsJob* jobs, int64_t count, bool allow_tf32,
                                     const Machine& machine);

// How many counters `coefficients` needs: they are zero before a call and after it, and calls that
// may run at the same time share none.
int64_t coefficients_counters();

// The largest l that one block's shared memory holds; for `largest_jacobi` with p rows, or square
// where p is 0.
int64_t largest_cholesky(const Machine& machine);
int64_t largest_jacobi(int64_t p, const Machine& machine);

// All enqueue their launches on `stream` of the current device and return; they throw
// std::invalid_argument on a job they cannot run and std::runtime_error on a CUDA error.
void coefficients(const CoefficientsJob* jobs, int64_t count, bool allow_tf32,
                  const Machine& machine, void* workspace, int32_t* counters, cudaStream_t stream);
void update(const UpdateJob* jobs, int64_t count, bool allow_tf32, const Machine& machine,
            cudaStream_t stream);
void cholesky_inverse(const CholeskyJob& job, const Machine& machine, cudaStream_t stream);
void jacobi_svd(const JacobiJob& job, const Machine& machine, cudaStream_t stream);

// Compute capabilities this library was compiled for, as 100·major + 10·minor, ended by a 0.
const int* compiled_architectures();
// Why the current device cannot run this library: it holds neither machine code for it nor PTX
// that the driver takes. Leaves no error behind.
cudaError_t image_error();
// The compiler, as 1000·major + 10·minor.
int compiler_version();

}  // namespace osf
