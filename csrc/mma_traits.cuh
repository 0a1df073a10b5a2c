// Products of tiles on tensor cores. One trait a kind of arithmetic says which element lies in
// shared memory, how a fragment is read and how two fragments multiply.
//
// A fragment is always a block of 16 rows of one factor by kDepth of the summed dimension, read the
// same way for either factor: registers 0 and 2 are its rows 0-7, registers 1 and 3 its rows 8-15.
// So the left factor of an instruction is a whole fragment and the right factor half of one.
#pragma once

#include "launch.h"
#include "tile.cuh"

namespace osf {

template <class T>
struct HalfPrecisionFragments {
  using Element = T;
  static constexpr int kDepth = 16;
  struct Fragment {
    uint32_t r[4];
  };

  // `summed` is the dimension of the tile's matrix that the product sums over.
  static __device__ __forceinline__ void load(Fragment& f, const Tile<T>& tile, int row, int depth,
                                              int summed) {
    const int lane = threadIdx.x & 31;
    const bool transposed = tile.inner != summed;
    const int in_block = lane & 7;
    const int odd_block = ((lane >> 3) & 1) * 8, high_blocks = (lane >> 4) * 8;
    const int line = transposed ? depth + in_block + high_blocks : row + in_block + odd_block;
    const int position = transposed ? row + odd_block : depth + high_blocks;
    ptx::ldmatrix_x4(f.r, tile.data + tile.layout.offset(line, position), transposed);
  }
};

struct FloatFragments {
  using Element = float;
  static constexpr int kDepth = 8;

  static __device__ __forceinline__ void load(float (&v)[4], const Tile<float>& tile, int row,
                                              int depth, int summed) {
    const int lane = threadIdx.x & 31;
    const int r = row + (lane >> 2), d = depth + (lane & 3);
    const bool transposed = tile.inner != summed;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int block_row = r + (i & 1) * 8, block_depth = d + (i >> 1) * 4;
      const int offset = transposed ? tile.layout.offset(block_depth, block_row)
                                    : tile.layout.offset(block_row, block_depth);
      v[i] = ptx::load_shared(tile.data + offset);
    }
  }
};

template <Math math>
struct MathTraits;

template <>
struct MathTraits<Math::bf16> : HalfPrecisionFragments<bf16> {
  static __device__ __forceinline__ void mma(float (&d)[4], const Fragment& a, const Fragment& b,
                                             int half) {
    ptx::mma_bf16(d, a.r, b.r[half], b.r[2 + half]);
  }
};

template <>
struct MathTraits<Math::f16> : HalfPrecisionFragments<f16> {
  static __device__ __forceinline__ void mma(float (&d)[4], const Fragment& a, const Fragment& b,
                                             int half) {
    ptx::mma_f16(d, a.r, b.r[half], b.r[2 + half]);
  }
};

template <>
struct MathTraits<Math::tf32> : FloatFragments {
  struct Fragment {
    uint32_t r[4];
  };
  static __device__ __forceinline__ void load(Fragment& f, const Tile<float>& tile, int row,
                                              int depth, int summed) {
    float v[4];
    FloatFragments::load(v, tile, row, depth, summed);
#pragma unroll
    for (int i = 0; i < 4; ++i) f.r[i] = ptx::to_tf32(v[i]);
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const Fragment& a, const Fragment& b,
                                             int half) {
    ptx::mma_tf32(d, a.r, b.r[half], b.r[2 + half]);
  }
};

template <>
struct MathTraits<Math::tf32x3> : FloatFragments {
  struct Fragment {
    uint32_t high[4], low[4];
  };
  static __device__ __forceinline__ void load(Fragment& f, const Tile<float>& tile, int row,
                                              int depth, int summed) {
    float v[4];
    FloatFragments::load(v, tile, row, depth, summed);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      f.high[i] = ptx::to_tf32(v[i]);
      f.low[i] = ptx::to_tf32(v[i] - ptx::bits_to_float(f.high[i]));
    }
  }
  // The small products first; low·low is below the last bit. In an accumulator of their own, added
  // to the sum by an addition that rounds to nearest: tensor cores truncate where they add (Fasi,
  // Higham, Mikaitis and Pranesh 2021, PeerJ Computer Science 7:e330), so a sum kept in them drifts
  // toward zero with every step. Simulated so, float32 projections of six shapes are off by 1.7 to
  // 11 times what is allowed (twice the error of float32 sums) kept in, and leak up to 5.9e-6; by
  // 0.17 to 0.53 of it added apart, and leak at most 2.3e-7.
  static __device__ __forceinline__ void mma(float (&d)[4], const Fragment& a, const Fragment& b,
                                             int half) {
    float apart[4] = {};
    ptx::mma_tf32(apart, a.low, b.high[half], b.high[2 + half]);
    ptx::mma_tf32(apart, a.high, b.low[half], b.low[2 + half]);
    ptx::mma_tf32(apart, a.high, b.high[half], b.high[2 + half]);
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += apart[i];
  }
};

// A warp's accumulators of a (16 M, 16 N) product: element c of block (i, j) belongs to row
// 16 i + lane / 4 + 8 (c / 2) and column 8 j + 2 (lane % 4) + c % 2.
template <int M, int N>
struct Accumulators {
  float v[M][2 * N][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
      for (int j = 0; j < 2 * N; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) v[i][j][c] = 0.0f;
  }
};

// acc += a b over DEPTH of the summed dimension; `a` from its row a_row on, `b` from b_row on (both
// rows are counted along the dimension that is not summed).
template <class Traits, int DEPTH, int M, int N>
__device__ __forceinline__ void multiply(Accumulators<M, N>& acc,
                                         const Tile<typename Traits::Element>& a, int a_row,
                                         int a_summed, const Tile<typename Traits::Element>& b,
                                         int b_row, int b_summed) {
  // Two steps in flight, unless the accumulators and fragments leave no registers for it.
  [[maybe_unused]] constexpr int kSteps = M * N * sizeof(typename Traits::Fragment) < 256 ? 2 : 1;
#pragma unroll kSteps
  for (int depth = 0; depth < DEPTH; depth += Traits::kDepth) {
    typename Traits::Fragment left[M];
#pragma unroll
    for (int i = 0; i < M; ++i) Traits::load(left[i], a, a_row + 16 * i, depth, a_summed);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      typename Traits::Fragment right;
      Traits::load(right, b, b_row + 16 * j, depth, b_summed);
#pragma unroll
      for (int i = 0; i < M; ++i) {
        Traits::mma(acc.v[i][2 * j], left[i], right, 0);
        Traits::mma(acc.v[i][2 * j + 1], left[i], right, 1);
      }
    }
  }
}

}  // namespace osf
