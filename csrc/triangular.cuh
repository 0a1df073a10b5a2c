// What comes before one-sided Jacobi: M is made lower triangular, but for the order of its rows and
// columns, by Householder reflections from the right with the largest row first (Drmač & Veselić
// 2008, 2.2). They go into V as rotations do, and need no memory of their own. In the emulator ill
// conditioned matrices then take 7 to 10 sweeps, not 10 to 30.
#pragma once

#include <cmath>

#include "ptx.cuh"

namespace osf {
namespace jacobi {

// V's memory is shared or global; the columns' is shared.
template <bool SHARED>
__device__ __forceinline__ float load(const float* p) {
  return SHARED ? ptx::load_shared(p) : ptx::load_global(p);
}
template <bool SHARED>
__device__ __forceinline__ void store(float* p, float value) {
  SHARED ? ptx::store_shared(p, value) : ptx::store_global(p, value);
}

// A reflector I − τvvᵀ by the element of each column: kDone, the column takes no part any more;
// from 1 to 2, it is τ, and the column, of v = 1, takes the pivot row's norm; otherwise it is v,
// less than 1 in magnitude.
constexpr float kDone = 4.0f;

// A row of `lines` reflected. Returns the squared norm that is left of it in the columns that stay;
// with `pivot` that is made exactly zero.
template <bool SHARED>
__device__ __forceinline__ double reflect(float* lines, int stride, const float* u, int l,
                                          bool pivot) {
  float product = 0.0f, tau = 0.0f;
#pragma unroll 2
  for (int j = 0; j < l; ++j) {
    const float uj = ptx::load_shared(u + j);
    if (uj == kDone) continue;
    const float x = load<SHARED>(lines + j * stride);
    if (uj >= 1.0f) tau = uj;
    product += uj >= 1.0f ? x : x * uj;
  }
  product *= tau;
  double rest = 0.0;
#pragma unroll 2
  for (int j = 0; j < l; ++j) {
    const float uj = ptx::load_shared(u + j);
    if (uj == kDone) continue;
    float x = load<SHARED>(lines + j * stride);
    if (uj >= 1.0f) {
      x -= product;
    } else {
      x = pivot ? 0.0f : x - product * uj;
      rest += static_cast<double>(x) * static_cast<double>(x);
    }
    store<SHARED>(lines + j * stride, x);
  }
  return rest;
}

// One warp: the reflector that turns the pivot row onto its largest column. Returns that column.
__device__ __forceinline__ int make_reflector(const float* a, float* u, int row, int p, int l) {
  const int lane = threadIdx.x % 32;
  uint32_t largest = 0;
  double square[1] = {0.0};
  for (int j = lane; j < l; j += 32) {
    if (ptx::load_shared(u + j) == kDone) continue;
    const float x = ptx::load_shared(a + j * p + row);
    square[0] += static_cast<double>(x) * static_cast<double>(x);
    largest = max(largest, ptx::float_to_bits(x) & 0x7fffffffu);
  }
  ptx::warp_sum(square);
  largest = ptx::warp_max(largest);
  uint32_t before = 0;  // how far the column is from the end
  for (int j = lane; j < l; j += 32) {
    if (ptx::load_shared(u + j) == kDone) continue;
    const float x = ptx::load_shared(a + j * p + row);
    if ((ptx::float_to_bits(x) & 0x7fffffffu) == largest) {
      before = max(before, static_cast<uint32_t>(l - j));
    }
  }
  const int target = l - static_cast<int>(ptx::warp_max(before));
  const double norm = sqrt(square[0]);
  const double alpha = static_cast<double>(ptx::load_shared(a + target * p + row));
  const double tau = 1.0 + fabs(alpha) / norm, scale = 1.0 / (alpha + copysign(norm, alpha));
  for (int j = lane; j < l; j += 32) {
    if (ptx::load_shared(u + j) == kDone) continue;
    const double x = static_cast<double>(ptx::load_shared(a + j * p + row));
    ptx::store_shared(u + j, static_cast<float>(j == target ? tau : x * scale));
  }
  return target;
}

// a (p, l) lower triangular but for the order of its rows and columns, and v turned alike.
//
// The row with the largest rest is turned onto the column where it is largest, and so on: rows and
// columns of any grading keep the accuracy relative to their own size (Cox & Higham 1998). Its
// barriers are the first and the last thing it does.
template <bool SHARED_V>
__device__ __forceinline__ void triangularize(float* a, float* v, float* u, uint32_t* by_warp,
                                              int p, int l) {
  const int thread = threadIdx.x, threads = blockDim.x;
  const int lane = thread % 32, warp = thread / 32, warps = threads / 32;
  for (int j = thread; j < l; j += threads) ptx::store_shared(u + j, 0.0f);
  __syncthreads();
  int pivot = -1, target = -1;
  for (int step = 0; step < l; ++step) {
    // The rest's norm in the upper half, to 8 bits, and in the lower the row, of equals the first.
    uint32_t best = 0;
    for (int row = thread; row < p; row += threads) {
      const double rest = reflect<true>(a + row, p, u, l, row == pivot);
      const uint32_t norm = ptx::float_to_bits(static_cast<float>(sqrt(rest)));
      best = max(best, (norm & 0xffff0000u) | (0xffffu - static_cast<uint32_t>(row)));
    }
    if (step > 0) {
      for (int row = threads - 1 - thread; row < l; row += threads) {
        reflect<SHARED_V>(v + row, l, u, l, false);
      }
    }
    best = ptx::warp_max(best);
    if (lane == 0) ptx::store_shared(by_warp + warp, best);
    __syncthreads();
    for (int w = 0; w < warps; ++w) best = max(best, ptx::load_shared(by_warp + w));
    if (step == l - 1 || best < 0x00010000u) break;
    pivot = 0xffff - static_cast<int>(best & 0xffffu);
    if (warp == 0) {
      if (lane == 0 && target >= 0) ptx::store_shared(u + target, kDone);
      __syncwarp();
      target = make_reflector(a, u, pivot, p, l);
    }
    __syncthreads();
  }
}

}  // namespace jacobi
}  // namespace osf
