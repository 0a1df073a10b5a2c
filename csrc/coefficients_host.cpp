// Cuts `coefficients` jobs into units of work and lays out their partial sums.
#include <algorithm>
#include <vector>

#include "host.h"
#include "launch.h"

namespace osf {
namespace {

// More splits would cost more in partial sums than they gain in parallelism.
constexpr int64_t kMostSplits = 32;

// A job in the orientation the kernel runs it in. Either the job itself or its transpose,
// Aᵀ = xᵀ U and Bᵀ = Vᵀ xᵀ; strides are free, so turning a job costs nothing.
struct Oriented {
  CoefficientsJob job;
  bool with_a, with_b;
  bool a_offset, b_offset;  // whether S is taken off
  Math math;
  int rank_block;
  CoefficientsShape shape;
  int64_t row_blocks, splits, tiles_per_split, rank_chunks;
  int64_t ld_a, ld_b;
  int64_t a_floats, b_floats;
  int64_t a_sums, b_sums;  // units
};

Math choose_math(const CoefficientsJob& job, bool with_a, bool with_b, bool allow_tf32) {
  const auto all = [&](DType dtype) {
    return job.x.dtype == dtype && (!with_a || job.U.dtype == dtype) &&
           (!with_b || job.V.dtype == dtype);
  };
  if (all(DType::bf16)) return Math::bf16;
  if (all(DType::f16)) return Math::f16;
  return allow_tf32 && all(DType::f32) ? Math::tf32 : Math::tf32x3;
}

void validate(const CoefficientsJob& job) {
  require_side(job.m, "coefficients: m is out of range");
  require_side(job.n, "coefficients: n is out of range");
  require_side(job.r, "coefficients: r is out of range");
  require_side(job.k, "coefficients: k is out of range");
  for (const MatrixRef* a : {&job.x, &job.U, &job.V, &job.A, &job.B}) {
    require_matrix(*a, "coefficients: unknown dtype");
  }
  require(job.x.present(), "coefficients: x is absent");
  require(job.U.present() == job.A.present(), "coefficients: U and A are absent together");
  require(job.V.present() == job.B.present(), "coefficients: V and B are absent together");
  require(job.S == nullptr || (job.U.present() && job.V.present() && job.r == job.k),
          "coefficients: S needs both bases and r = k");
}

Oriented orient(const CoefficientsJob& given, bool allow_tf32, const Machine& machine) {
  validate(given);
  Oriented o{};
  o.job = given;
  o.with_a = given.U.present() && given.r > 0;
  o.with_b = given.V.present() && given.k > 0;
  o.a_offset = given.S != nullptr && given.root != 0;
  o.b_offset = given.S != nullptr;
  // B is the cheap side: one partial sum a split, against one a row block for A.
  if (o.with_a && (!o.with_b || given.r > given.k)) {
    o.job.x = transposed(given.x);
    std::swap(o.job.m, o.job.n);
    std::swap(o.job.r, o.job.k);
    std::swap(o.job.U, o.job.V);
    o.job.A = transposed(given.B);
    o.job.B = transposed(given.A);
    std::swap(o.with_a, o.with_b);
    std::swap(o.a_offset, o.b_offset);
  }
  const CoefficientsJob& job = o.job;
  const int64_t rank = std::max(o.with_a ? job.r : 0, o.with_b ? job.k : 0);
  o.math = choose_math(job, o.with_a, o.with_b, allow_tf32);
  const bool half = o.math == Math::bf16 || o.math == Math::f16;
  o.rank_block = half && rank > 64 ? 128 : 64;
  o.shape = coefficients_shape(half, o.rank_block);

  o.row_blocks = ceil_div(job.m, o.shape.rows);
  o.rank_chunks = ceil_div(rank, o.rank_block);
  const int64_t tiles = ceil_div(job.n, o.shape.columns);
  if (o.row_blocks > 0 && tiles > 0 && rank > 0) {
    const int64_t wanted = machine.multiprocessors / (o.row_blocks * o.rank_chunks);
    const int64_t most = std::max<int64_t>(1, std::min({wanted, tiles, kMostSplits}));
    o.tiles_per_split = ceil_div(tiles, most);
    o.splits = ceil_div(tiles, o.tiles_per_split);
  } else {
    o.row_blocks = o.splits = 0;  // the sums are empty: zeros less the offset
  }
  o.ld_a = ceil_div(job.n, 4) * 4;
  o.ld_b = ceil_div(job.k, 4) * 4;
  o.a_floats = o.with_a ? o.row_blocks * job.r * o.ld_a : 0;
  o.b_floats = o.with_b ? o.splits * job.m * o.ld_b : 0;
  o.a_sums = o.with_a ? ceil_div(job.r * o.ld_a / 4, kSumQuads) : 0;
  o.b_sums = o.with_b ? ceil_div(job.m * o.ld_b / 4, kSumQuads) : 0;
  return o;
}

CoefficientsProblem make_problem(const Oriented& o, float* part_a, float* part_b) {
  const CoefficientsJob& job = o.job;
  CoefficientsProblem p{};
  p.x = make_operand(job.x, job.m, job.n);
  if (o.with_a) p.U = make_operand(job.U, job.m, job.r);
  if (o.with_b) p.V = make_operand(job.V, job.n, job.k);
  p.part_a = part_a;
  p.part_b = part_b;
  p.A = job.A.data;
  p.B = job.B.data;
  p.S = job.S;
  p.A_stride[0] = job.A.stride0;
  p.A_stride[1] = job.A.stride1;
  p.B_stride[0] = job.B.stride0;
  p.B_stride[1] = job.B.stride1;
  p.S_stride = job.S_stride;
  p.m = static_cast<int>(job.m);
  p.n = static_cast<int>(job.n);
  p.r = o.with_a ? static_cast<int>(job.r) : 0;
  p.k = o.with_b ? static_cast<int>(job.k) : 0;
  p.ld_a = static_cast<int>(o.ld_a);
  p.ld_b = static_cast<int>(o.ld_b);
  p.row_blocks = static_cast<int>(o.row_blocks);
  p.splits = static_cast<int>(o.splits);
  p.tiles_per_split = static_cast<int>(o.tiles_per_split);
  p.rank_chunks = static_cast<int>(o.rank_chunks);
  p.a_sums = static_cast<int>(o.a_sums);
  p.A_dtype = static_cast<int8_t>(job.A.dtype);
  p.B_dtype = static_cast<int8_t>(job.B.dtype);
  p.A_offset = o.a_offset;
  p.B_offset = o.b_offset;
  return p;
}

void launch_group(Math math, int rank_block, const Params<CoefficientsProblem>& params,
                  int multiprocessors, cudaStream_t stream) {
  switch (math) {
    case Math::bf16:
      return rank_block == 64
                 ? launch_coefficients<Math::bf16, 64>(params, multiprocessors, stream)
                 : launch_coefficients<Math::bf16, 128>(params, multiprocessors, stream);
    case Math::f16:
      return rank_block == 64
                 ? launch_coefficients<Math::f16, 64>(params, multiprocessors, stream)
                 : launch_coefficients<Math::f16, 128>(params, multiprocessors, stream);
    case Math::tf32:
      return launch_coefficients<Math::tf32, 64>(params, multiprocessors, stream);
    case Math::tf32x3:
      return launch_coefficients<Math::tf32x3, 64>(params, multiprocessors, stream);
  }
}

}  // namespace

int64_t coefficients_workspace_bytes(const CoefficientsJob* jobs, int64_t count, bool allow_tf32,
                                     const Machine& machine) {
  int64_t floats = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Oriented o = orient(jobs[i], allow_tf32, machine);
    floats += o.a_floats + o.b_floats;
  }
  return floats * static_cast<int64_t>(sizeof(float));
}

int64_t coefficients_counters() {
  return Params<CoefficientsProblem>::kCapacity + 2;  // ordered.cuh
}

void coefficients(const CoefficientsJob* jobs, int64_t count, bool allow_tf32,
                  const Machine& machine, void* workspace, int32_t* counters, cudaStream_t stream) {
  std::vector<Oriented> oriented;
  oriented.reserve(count);
  for (int64_t i = 0; i < count; ++i) oriented.push_back(orient(jobs[i], allow_tf32, machine));

  constexpr std::pair<Math, int> kGroups[] = {{Math::bf16, 64}, {Math::bf16, 128},
                                              {Math::f16, 64},  {Math::f16, 128},
                                              {Math::tf32, 64}, {Math::tf32x3, 64}};
  for (const auto& [math, rank_block] : kGroups) {
    Batcher<CoefficientsProblem> batch(
        [&, math = math, rank_block = rank_block](const Params<CoefficientsProblem>& params) {
          launch_group(math, rank_block, params, machine.multiprocessors, stream);
        },
        counters);
    float* part = static_cast<float*>(workspace);
    for (const Oriented& o : oriented) {
      if (o.math == math && o.rank_block == rank_block) {
        batch.add(make_problem(o, part, part + o.a_floats), o.row_blocks * o.splits * o.rank_chunks,
                  o.a_sums + o.b_sums);
      }
      part += o.a_floats + o.b_floats;
    }
    batch.flush();
  }
}

}  // namespace osf
