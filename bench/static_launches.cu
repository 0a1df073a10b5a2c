// Prints what the hosts of csrc/ decide of a launch; `python -m bench static` compiles it. A line:
// kernel;template arguments;arithmetic;config;threads;dynamic shared memory.
//
// Factorizations go through their host, whose launch functions are replaced. instances.inc, which
// is generated, calls the functions of the first two once for each file of csrc/inst.
#include <cstdio>
#include <cstdlib>

#include "coefficients.cuh"
#include "factor_host.cpp"
#include "update.cuh"

namespace osf {

template <Math math, int RANK>
void coefficients_line(const char* name) {
  using T = CoefficientsTraits<math, RANK>;
  std::printf("coefficients;%d,%d;%s;rows=%d columns=%d rank=%d stages=%d;%d;%d\n",
              static_cast<int>(math), RANK, name, T::kRows, T::kColumns, RANK, T::kStages, kThreads,
              T::kSharedBytes);
}

template <Math math>
void update_line(const char* name) {
  using T = UpdateTraits<math>;
  std::printf("update;%d;%s;rows=%d columns=%d rank=%d stages=%d;%d;%d\n", static_cast<int>(math),
              name, T::kRows, T::kColumns, T::kChunk, T::kStages, kThreads, T::kSharedBytes);
}

void launch_cholesky(const CholeskyParams& p, int, int threads, cudaStream_t) {
  std::printf("cholesky;;fp32;l=%d;%d;%d\n", p.l, threads,
              static_cast<int>(cholesky_shared_bytes(p.l)));
}

template <bool SHARED_V>
void launch_jacobi(const JacobiParams& p, int, int threads, cudaStream_t) {
  std::printf("jacobi;%d;fp32;p=%d l=%d %s;%d;%d\n", SHARED_V, p.p, p.l,
              SHARED_V ? "V shared" : "V global", threads,
              static_cast<int>(jacobi_shared_bytes(p.p, p.l, SHARED_V)));
}

void factorizations(int shared_bytes) {
  const Machine machine{128, shared_bytes};
  const int64_t most = largest_jacobi(0, machine);
  const int64_t both =
      largest(most, machine, [](int64_t l) { return jacobi_shared_bytes(l, l, true); });
  for (const int64_t l : {int64_t{64}, largest_cholesky(machine)}) {
    CholeskyJob job{};
    job.batch = 1, job.l = l;
    cholesky_inverse(job, machine, nullptr);
  }
  for (const int64_t l : {int64_t{64}, both, most}) {
    JacobiJob job{};
    job.batch = 1, job.p = job.l = l;
    jacobi_svd(job, machine, nullptr);
  }
}

}  // namespace osf

int main(int, char** arguments) {
  using namespace osf;
#include "instances.inc"
  factorizations(std::atoi(arguments[1]));
}
