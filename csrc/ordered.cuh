// Sums over several blocks in one launch, in a fixed order.
//
// Blocks claim the units of products one by one and write what they sum as partial sums. A block
// that finds none left goes on to its share of the sums, waits until the partial sums of a problem
// are there, and adds them in the order of the slices, so that two runs agree bit for bit. Only
// blocks that run claim, and a product waits for nothing, so a wait ends however few blocks of the
// grid are resident.
#pragma once

#include "convert.cuh"
#include "launch.h"
#include "schedule.cuh"

namespace osf {

// Of a launch, zero before and after it: units claimed, blocks finished, and then, a problem, its
// units whose partial sums are written.
enum Counter { kClaimed = 0, kFinished = 1, kWritten = 2 };

// The block's next unit, or a number beyond the last; thread 0 alone gets it.
__device__ __forceinline__ int claim_unit(int* counters) {
  return threadIdx.x == 0 ? ptx::increment(counters + kClaimed) : 0;
}

// From thread 0 to all, which read it after the next barrier.
__device__ __forceinline__ void tell_unit(int* shared, int unit) {
  if (threadIdx.x == 0) ptx::store_shared(shared, unit);
}

// Counts a unit of a problem; the caller's barrier has gathered what its threads wrote.
__device__ __forceinline__ void count_written(int* counters, int problem) {
  if (threadIdx.x != 0) return;
  ptx::fence();
  ptx::increment(counters + kWritten + problem);
}

__device__ __forceinline__ void wait_until_written(int* counters, int problem, int units) {
  if (threadIdx.x == 0) {
    while (ptx::load_acquire(counters + kWritten + problem) < units) ptx::pause();
  }
  __syncthreads();
}

// The last block to come here leaves the counters at zero: no other looks at them again.
__device__ __forceinline__ void finish(int* counters, int problems) {
  if (threadIdx.x != 0) return;
  ptx::fence();
  if (ptx::increment(counters + kFinished) != static_cast<int>(gridDim.x) - 1) return;
  ptx::fence();
  for (int i = 0; i < kWritten + problems; ++i) ptx::store_global(counters + i, 0);
}

// out (rows, columns) = Σ_slices part − diag(S) basis, or basis diag(S).
struct PartialSums {
  const float* part;  // (slices, rows, ld)
  int slices, rows, columns, ld;
  void* out;
  int64_t out_stride[2];
  int out_dtype;
  const float* S;  // null without offset
  int64_t S_stride[2];
  const Operand& basis;
  int64_t basis_stride[2];
};

__device__ __forceinline__ PartialSums sums_of_a(const CoefficientsProblem& p) {
  return {p.part_a,
          p.row_blocks,
          p.r,
          p.n,
          p.ld_a,
          p.A,
          {p.A_stride[0], p.A_stride[1]},
          p.A_dtype,
          p.A_offset ? p.S : nullptr,
          {p.S_stride, 0},
          p.V,
          {p.V.stride[1], p.V.stride[0]}};
}
__device__ __forceinline__ PartialSums sums_of_b(const CoefficientsProblem& p) {
  return {p.part_b,
          p.splits,
          p.m,
          p.k,
          p.ld_b,
          p.B,
          {p.B_stride[0], p.B_stride[1]},
          p.B_dtype,
          p.B_offset ? p.S : nullptr,
          {0, p.S_stride},
          p.U,
          {p.U.stride[0], p.U.stride[1]}};
}

// The thread's four elements of a unit. Lines of partial sums are padded to a multiple of four.
__device__ __forceinline__ void add_partials(const PartialSums& s, int unit) {
  constexpr int kBatch = 8;  // loads in flight before the first is added
  const int quads = s.ld / 4;
  const int64_t quad = static_cast<int64_t>(unit) * kSumQuads + threadIdx.x;
  if (quad >= static_cast<int64_t>(s.rows) * quads) return;
  const int row = static_cast<int>(quad / quads), column = static_cast<int>(quad % quads) * 4;
  const int64_t slice_quads = static_cast<int64_t>(s.rows) * quads;
  const float4* const part = reinterpret_cast<const float4*>(s.part) + quad;
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int slice = 0; slice < s.slices; slice += kBatch) {
    float4 v[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      v[j] = slice + j < s.slices ? ptx::load_published(part + (slice + j) * slice_quads)
                                  : make_float4(0.0f, 0.0f, 0.0f, 0.0f);  // changes no sum
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      sum[0] += v[j].x, sum[1] += v[j].y, sum[2] += v[j].z, sum[3] += v[j].w;
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int c = column + j;
    if (c >= s.columns) break;
    if (s.S != nullptr) {
      const float scale = ptx::load_global(s.S + row * s.S_stride[0] + c * s.S_stride[1]);
      sum[j] -= scale * load_element(s.basis.data, s.basis.dtype,
                                     row * s.basis_stride[0] + c * s.basis_stride[1]);
    }
    store_element(s.out, s.out_dtype, row * s.out_stride[0] + c * s.out_stride[1], sum[j]);
  }
}

// The block's share of a launch's sums, each once its partial sums are there.
__device__ __forceinline__ void add_all_partials(const Params<CoefficientsProblem>& params) {
  int ready = -1;
  for (int unit = blockIdx.x; unit < params.sums; unit += gridDim.x) {
    const CoefficientsProblem& p = problem_of(params, unit, &CoefficientsProblem::sum_begin);
    const int problem = static_cast<int>(&p - params.problem);
    if (problem != ready) {
      wait_until_written(params.counters, problem, p.row_blocks * p.splits * p.rank_chunks);
      ready = problem;
    }
    const int local = unit - p.sum_begin;
    if (local < p.a_sums) {
      add_partials(sums_of_a(p), local);
    } else {
      add_partials(sums_of_b(p), local - p.a_sums);
    }
  }
}

}  // namespace osf
