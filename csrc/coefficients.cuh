// A = Uᵀ x and B = x V from one read of x.
//
// A unit of work is a block of rows of x, a range of its columns and a chunk of both ranks. Tiles
// of x and of V stream through shared memory; the block of U stays. B gathers in registers along
// the range and becomes one partial sum a range. A is complete for the block of rows at every tile
// and becomes one partial sum a block. The same launch adds them in a fixed order (ordered.cuh).
#pragma once

#include "launch.h"
#include "mma_traits.cuh"
#include "ordered.cuh"
#include "runtime.cuh"

namespace osf {

template <Math math, int RANK>
struct CoefficientsTraits : MathTraits<math> {
  using Element = typename MathTraits<math>::Element;
  static constexpr CoefficientsShape kShape = coefficients_shape(sizeof(Element) == 2, RANK);
  static_assert(kShape.rank == RANK, "an instantiated rank block");
  static constexpr int kRows = kShape.rows, kColumns = kShape.columns, kRank = RANK;
  static constexpr int kStages = sizeof(Element) == 2 && RANK == 64 ? 3 : 4;

  // B: each warp owns kRows / kWarps rows and all of the rank.
  static constexpr int kWarpRows = kRows / kWarps;
  // A: warps tile (rank, columns), 16 of the rank each.
  static constexpr int kRankWarps = RANK / 16, kColumnWarps = kWarps / kRankWarps;
  static constexpr int kWarpColumns = kColumns / kColumnWarps;

  static constexpr int kXElements = kRows * kColumns;
  static constexpr int kVElements = kColumns * RANK;
  static constexpr int kUElements = kRows * RANK;
  static constexpr int kTileBytes =
      (kUElements + kStages * (kXElements + kVElements)) * sizeof(Element);
  static constexpr int kSharedBytes = kTileBytes + 16;  // and the claimed unit
};

// Pairs of accumulators. Lines are padded to a multiple of four, so a pair that starts inside may
// end in the padding.
template <int M, int N>
__device__ __forceinline__ void store_partial(float* part, const Accumulators<M, N>& acc, int row,
                                              int column, int rows, int columns, int ld) {
#pragma unroll
  for (int i = 0; i < M; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + 16 * i + 8 * h;
#pragma unroll
      for (int j = 0; j < 2 * N; ++j) {
        const int c = column + 8 * j;
        if (r < rows && c < columns) {
          ptx::publish(reinterpret_cast<float2*>(part + static_cast<int64_t>(r) * ld + c),
                       make_float2(acc.v[i][j][2 * h], acc.v[i][j][2 * h + 1]));
        }
      }
    }
  }
}

template <class Traits>
__global__ __launch_bounds__(kThreads, 1) void coefficients_kernel(
    OSF_GRID_CONSTANT(Params<CoefficientsProblem>) params) {
  using T = typename Traits::Element;
  constexpr int ROWS = Traits::kRows, COLUMNS = Traits::kColumns, RANK = Traits::kRank;
  constexpr int STAGES = Traits::kStages;
  using LoadU = TileLoader<T, ROWS, RANK, kThreads>;
  using LoadX = TileLoader<T, ROWS, COLUMNS, kThreads>;
  using LoadV = TileLoader<T, COLUMNS, RANK, kThreads>;

  T* const shared_u = reinterpret_cast<T*>(ptx::shared_memory());
  T* const shared_x = shared_u + Traits::kUElements;
  T* const shared_v = shared_x + STAGES * Traits::kXElements;
  int* const claimed = reinterpret_cast<int*>(ptx::shared_memory() + Traits::kTileBytes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  tell_unit(claimed, claim_unit(params.counters));
  __syncthreads();
  for (;;) {
    const int unit = ptx::load_shared(claimed);
    if (unit >= params.units) break;
    const CoefficientsProblem& p = problem_of(params, unit);
    const int local = unit - p.unit_begin;
    const int rank0 = local % p.rank_chunks * RANK;
    const int split = local / p.rank_chunks % p.splits;
    const int row_block = local / p.rank_chunks / p.splits;
    const int row0 = row_block * ROWS;
    const int tile0 = split * p.tiles_per_split;
    const int tiles = min(p.tiles_per_split, (p.n + COLUMNS - 1) / COLUMNS - tile0);
    const bool with_a = rank0 < p.r, with_b = rank0 < p.k;

    const Tile<T> u = make_tile<T, ROWS, RANK>(shared_u, p.U);
    auto x_at = [&](int stage) {
      return make_tile<T, ROWS, COLUMNS>(shared_x + stage * Traits::kXElements, p.x);
    };
    auto v_at = [&](int stage) {
      return make_tile<T, COLUMNS, RANK>(shared_v + stage * Traits::kVElements, p.V);
    };
    auto load = [&](int t) {
      const int column0 = (tile0 + t) * COLUMNS;
      LoadX::load(x_at(t % STAGES), p.x, {p.x, row0, column0, p.m, p.n});
      if (with_b) LoadV::load(v_at(t % STAGES), p.V, {p.V, column0, rank0, p.n, p.k});
    };

    if (with_a) LoadU::load(u, p.U, {p.U, row0, rank0, p.m, p.r});
#pragma unroll
    for (int t = 0; t < STAGES - 1; ++t) {
      if (t < tiles) load(t);
      ptx::cp_async_commit();
    }

    Accumulators<Traits::kWarpRows / 16, RANK / 16> b;
    b.clear();
    for (int t = 0; t < tiles; ++t) {
      ptx::cp_async_wait<STAGES - 2>();
      __syncthreads();  // tile t is there for all, and all are done with tile t - 1
      if (t + STAGES - 1 < tiles) load(t + STAGES - 1);
      ptx::cp_async_commit();

      const Tile<T> x = x_at(t % STAGES);
      if (with_b) {
        multiply<Traits, COLUMNS>(b, x, warp * Traits::kWarpRows, 1, v_at(t % STAGES), 0, 0);
      }
      if (with_a) {
        Accumulators<1, Traits::kWarpColumns / 16> a;
        a.clear();
        const int warp_rank = warp / Traits::kColumnWarps * 16;
        const int warp_column = warp % Traits::kColumnWarps * Traits::kWarpColumns;
        multiply<Traits, ROWS>(a, u, warp_rank, 0, x, warp_column, 0);
        float* const part = p.part_a + static_cast<int64_t>(row_block) * p.r * p.ld_a;
        const int row = rank0 + warp_rank + lane / 4;
        const int column = (tile0 + t) * COLUMNS + warp_column + lane % 4 * 2;
        store_partial(part, a, row, column, p.r, p.n, p.ld_a);
      }
    }
    const int next = claim_unit(params.counters);  // on its way while B is stored
    if (with_b) {
      float* const part = p.part_b + static_cast<int64_t>(split) * p.m * p.ld_b;
      const int row = row0 + warp * Traits::kWarpRows + lane / 4;
      store_partial(part, b, row, rank0 + lane % 4 * 2, p.m, p.k, p.ld_b);
    }
    tell_unit(claimed, next);
    __syncthreads();  // all have written their sums, and are done with U and the stages
    count_written(params.counters, static_cast<int>(&p - params.problem));
  }
  add_all_partials(params);
  finish(params.counters, params.count);
}

template <Math math, int RANK>
void launch_coefficients(const Params<CoefficientsProblem>& params, int multiprocessors,
                         cudaStream_t stream) {
  using Traits = CoefficientsTraits<math, RANK>;
  launch(coefficients_kernel<Traits>, "coefficients", params, multiprocessors, Traits::kSharedBytes,
         stream);
}

}  // namespace osf
