// Turns `update` jobs into tiles of out.
#include "host.h"
#include "launch.h"

namespace osf {
namespace {

void validate(const UpdateJob& job) {
  require_side(job.m, "update: m is out of range");
  require_side(job.n, "update: n is out of range");
  require_side(job.r, "update: r is out of range");
  require_side(job.k, "update: k is out of range");
  for (const MatrixRef* a : {&job.out, &job.x, &job.addend, &job.L1, &job.R1, &job.L2, &job.R2}) {
    require_matrix(*a, "update: unknown dtype");
  }
  require(job.out.present(), "update: out is absent");
  require(job.beta == 0.0 || job.x.present(), "update: x is absent and beta is not 0");
  require(job.L1.present() == job.R1.present(), "update: L1 and R1 are absent together");
  require(job.L2.present() == job.R2.present(), "update: L2 and R2 are absent together");
}

// The kernel vectorizes along rows of out; outᵀ = beta·xᵀ + alpha·(R2ᵀ L2ᵀ + R1ᵀ L1ᵀ) + addendᵀ.
UpdateJob orient(const UpdateJob& job) {
  if (job.out.stride1 == 1 || job.out.stride0 != 1) return job;
  UpdateJob t = job;
  std::swap(t.m, t.n);
  std::swap(t.r, t.k);
  t.out = transposed(job.out);
  t.x = transposed(job.x);
  t.addend = transposed(job.addend);
  t.L1 = transposed(job.R2);
  t.R1 = transposed(job.L2);
  t.L2 = transposed(job.R1);
  t.R2 = transposed(job.L1);
  return t;
}

// fp16 cannot hold a coefficient beyond 65504; tf32 holds every fp16 basis exactly and has its
// precision, so fp16 multiplies there.
Math choose_math(const UpdateJob& job, bool allow_tf32) {
  const auto all = [&](DType dtype) {
    return job.out.dtype == dtype && (job.beta == 0.0 || job.x.dtype == dtype) &&
           (!job.L1.present() || job.L1.dtype == dtype) &&
           (!job.R2.present() || job.R2.dtype == dtype);
  };
  if (all(DType::bf16)) return Math::bf16;
  if (all(DType::f16)) return Math::tf32;
  return allow_tf32 && all(DType::f32) ? Math::tf32 : Math::tf32x3;
}

UpdateProblem make_problem(const UpdateJob& job) {
  UpdateProblem p{};
  p.out = make_operand(job.out, job.m, job.n);
  if (job.beta != 0.0) p.x = make_operand(job.x, job.m, job.n);
  p.addend = make_operand(job.addend, job.m, job.n);
  if (job.L1.present() && job.r > 0) {
    p.L[0] = make_operand(job.L1, job.m, job.r);
    p.R[0] = make_operand(job.R1, job.r, job.n);
    p.rank[0] = static_cast<int>(job.r);
  }
  if (job.L2.present() && job.k > 0) {
    p.L[1] = make_operand(job.L2, job.m, job.k);
    p.R[1] = make_operand(job.R2, job.k, job.n);
    p.rank[1] = static_cast<int>(job.k);
  }
  p.m = static_cast<int>(job.m);
  p.n = static_cast<int>(job.n);
  p.column_tiles = static_cast<int>(ceil_div(job.n, kUpdateColumns));
  p.alpha = static_cast<float>(job.alpha);
  p.beta = static_cast<float>(job.beta);
  return p;
}

}  // namespace

void update(const UpdateJob* jobs, int64_t count, bool allow_tf32, const Machine& machine,
            cudaStream_t stream) {
  for (int64_t i = 0; i < count; ++i) validate(jobs[i]);
  for (const Math math : {Math::bf16, Math::tf32, Math::tf32x3}) {
    Batcher<UpdateProblem> batch([&](const Params<UpdateProblem>& params) {
      switch (math) {
        case Math::bf16:
          return launch_update<Math::bf16>(params, machine.multiprocessors, stream);
        case Math::tf32:
          return launch_update<Math::tf32>(params, machine.multiprocessors, stream);
        default:
          return launch_update<Math::tf32x3>(params, machine.multiprocessors, stream);
      }
    });
    for (int64_t i = 0; i < count; ++i) {
      if (choose_math(jobs[i], allow_tf32) != math) continue;
      const UpdateJob job = orient(jobs[i]);
      batch.add(make_problem(job), ceil_div(job.m, kUpdateRows) * ceil_div(job.n, kUpdateColumns));
    }
    batch.flush();
  }
}

}  // namespace osf
