// Hosts of the batched factorizations: sizes checked, one block a matrix.
#include <algorithm>

#include "host.h"
#include "launch.h"

namespace osf {

namespace {

// The largest l up to `most` whose bytes, which grow with l, fit.
template <class Bytes>
int64_t largest(int64_t most, const Machine& machine, Bytes bytes) {
  int64_t l = 0;
  while (l < most && bytes(l + 1) <= machine.shared_bytes) ++l;
  return l;
}

constexpr int64_t kMost = std::numeric_limits<int>::max();

int threads_of(int64_t warps, int most) {
  return 32 * static_cast<int>(std::clamp<int64_t>(warps, 1, most / 32));
}

}  // namespace

int64_t largest_cholesky(const Machine& machine) {
  return largest(kMost, machine, cholesky_shared_bytes);
}

int64_t largest_jacobi(int64_t p, const Machine& machine) {
  if (p == 0) {
    return largest(kMost, machine, [](int64_t l) { return jacobi_shared_bytes(l, l, false); });
  }
  return largest(p, machine, [p](int64_t l) { return jacobi_shared_bytes(p, l, false); });
}

void cholesky_inverse(const CholeskyJob& job, const Machine& machine, cudaStream_t stream) {
  require(job.batch >= 0 && job.batch <= kMost, "cholesky_inverse: the batch is too large");
  require(job.l >= 0 && job.l <= largest_cholesky(machine),
          "cholesky_inverse: the matrices do not fit in shared memory");
  if (job.batch == 0 || job.l == 0) return;
  CholeskyParams params{};
  params.G = job.G;
  std::copy_n(job.G_stride, 3, params.G_stride);
  params.inverse = job.inverse;
  params.info = job.info;
  params.l = static_cast<int>(job.l);
  launch_cholesky(params, static_cast<int>(job.batch),
                  threads_of(ceil_div(job.l, 16), kCholeskyThreads), stream);
}

void jacobi_svd(const JacobiJob& job, const Machine& machine, cudaStream_t stream) {
  require(job.batch >= 0 && job.batch <= kMost, "jacobi_svd: the batch is too large");
  require(job.l >= 0 && job.p >= job.l, "jacobi_svd: the matrices have more columns than rows");
  if (job.batch == 0 || job.l == 0) return;
  require(job.l <= largest_jacobi(job.p, machine),
          "jacobi_svd: the matrices do not fit in shared memory");
  JacobiParams params{};
  params.M = job.M;
  std::copy_n(job.M_stride, 3, params.M_stride);
  params.Ut = job.Ut;
  params.S = job.S;
  params.Vt = job.Vt;
  params.info = job.info;
  params.p = static_cast<int>(job.p);
  params.l = static_cast<int>(job.l);
  // √p·2⁻²⁴, the bound of LAPACK's xGESVJ, and no less than what rounding leaves of short columns.
  params.tolerance2 = static_cast<double>(std::max<int64_t>(job.p, 16)) * 0x1p-48;
  const int threads = threads_of(ceil_div(job.l, 2), kJacobiThreads);
  const bool shared_v = jacobi_shared_bytes(job.p, job.l, true) <= machine.shared_bytes;
  (shared_v ? launch_jacobi<true> : launch_jacobi<false>)(params, static_cast<int>(job.batch),
                                                          threads, stream);
}

}  // namespace osf
