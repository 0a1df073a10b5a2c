// M = U diag(S) Vᵀ by one-sided Jacobi, one matrix a block: columns of M are rotated in pairs until
// all are orthogonal, then their norms are S and their directions U; V gathers the rotations.
//
// The columns lie in shared memory, and V beside them where it fits. Where it does not, V gathers
// in its output, which the L2 cache holds: only a rotation touches V, while the columns are read
// for every pair, and so l grows by √2. (V recovered at the end as MᵀU/S would lose what belongs to
// small S.)
//
// First M is made triangular (triangular.cuh).
//
// A sweep meets all pairs in rounds of disjoint ones, a warp a pair, in the order of a round-robin
// tournament. (With the longer column of a pair put first it needs half as many sweeps again.)
//
// Inner products are summed in double: squares of float32 then neither overflow nor underflow, so
// columns of any lengths meet on equal terms and small singular values keep their relative
// accuracy.
#pragma once

#include <cmath>

#include "launch.h"
#include "runtime.cuh"
#include "triangular.cuh"

namespace osf {
namespace jacobi {

constexpr int kSweeps = 30;
constexpr uint32_t kNaN = 0x7fffffffu;
// A column that is not orthogonal to another 2^120 times as long becomes zero: the tangent of its
// angle would be no normal number. So does one shorter than 2^-115, the matrix being scaled to just
// below 2^126: its rounding is no longer relative to its length.
constexpr double kNegligible2 = 0x1p-240, kShortest2 = 0x1p-230;

// The power of two below which max|M| comes to lie, such that no column's norm can overflow.
__device__ __forceinline__ int scaled_exponent(int p, int l) {
  int exponent = 126;
  for (int64_t area = 1; area < static_cast<int64_t>(p) * l; area *= 4) --exponent;
  return exponent;
}

// 2^exponent of at most 3·126 either way, beyond what a float32 holds.
__device__ __forceinline__ double power_of_two(int exponent) {
  const int third = exponent / 3, rest = exponent - 2 * third;
  const double factor = ptx::bits_to_float(static_cast<uint32_t>(third + 127) << 23);
  return factor * factor * ptx::bits_to_float(static_cast<uint32_t>(rest + 127) << 23);
}

// The least exponent with value < 2^exponent, of the bits of a positive float32.
__device__ __forceinline__ int exponent_above(uint32_t bits) {
  if (bits >= 0x00800000u) return static_cast<int>(bits >> 23) - 126;
  const uint32_t normal = ptx::float_to_bits(ptx::bits_to_float(bits) * 0x1p24f);
  return static_cast<int>(normal >> 23) - 126 - 24;
}

// Columns i <- cos·i + sin·j and j <- cos·j − sin·i, with ratio = sin / (1 + cos): in this form a
// rounded ratio leaves their norms as they were.
struct Rotation {
  float sine, ratio;
};

__device__ __forceinline__ void rotate(float& x, float& y, const Rotation& by) {
  const float old = x;
  x += by.sine * (y - by.ratio * old);
  y -= by.sine * (old + by.ratio * y);
}

__device__ __forceinline__ float dot(const float* x, const float* y, int rows) {
  double sum[1] = {0.0};
  for (int row = threadIdx.x % 32; row < rows; row += 32) {
    sum[0] += static_cast<double>(ptx::load_shared(x + row)) *
              static_cast<double>(ptx::load_shared(y + row));
  }
  ptx::warp_sum(sum);
  return static_cast<float>(sum[0]);
}

// This block's of matrices of `elements` each. Found anew at each use: registers are scarce.
template <class T>
__device__ __forceinline__ T* matrix_of(T* all, int elements) {
  return all + static_cast<int64_t>(blockIdx.x) * elements;
}

// The columns `first` and `second` of a (p rows) orthogonal, and v (l rows) turned alike. Returns
// whether they were not orthogonal before; the same in all lanes.
template <bool SHARED_V>
__device__ __forceinline__ bool orthogonalize(float* a, float* v, int first, int second,
                                              const JacobiParams& params) {
  const int lane = threadIdx.x % 32, p = params.p, l = params.l;
  float* x = a + first * p;
  float* y = a + second * p;
  double product[3] = {0.0, 0.0, 0.0};  // xx, yy, xy
#pragma unroll 4
  for (int row = lane; row < p; row += 32) {
    const double xr = static_cast<double>(ptx::load_shared(x + row));
    const double yr = static_cast<double>(ptx::load_shared(y + row));
    product[0] += xr * xr;
    product[1] += yr * yr;
    product[2] += xr * yr;
  }
  ptx::warp_sum(product);
  const double xy = product[2];
  if (!(xy * xy > params.tolerance2 * (product[0] * product[1]))) return false;

  const double longer = max(product[0], product[1]), shorter = min(product[0], product[1]);
  if (shorter < kShortest2 || shorter < kNegligible2 * longer) {
    float* const negligible = product[0] < product[1] ? x : y;
    for (int row = lane; row < p; row += 32) ptx::store_shared(negligible + row, 0.0f);
    return true;
  }
  const double unit = 1.0 / longer;
  const float difference = static_cast<float>((product[0] - product[1]) * unit);
  const float twice = static_cast<float>(2.0 * xy * unit);
  const float hypotenuse = sqrtf(difference * difference + twice * twice);
  const float tangent = twice / (difference + copysignf(hypotenuse, difference));
  const float cosine = 1.0f / sqrtf(1.0f + tangent * tangent);
  const float sine = tangent * cosine;
  const Rotation by{sine, sine / (1.0f + cosine)};

#pragma unroll 4
  for (int row = lane; row < p; row += 32) {
    float xr = ptx::load_shared(x + row);
    float yr = ptx::load_shared(y + row);
    rotate(xr, yr, by);
    ptx::store_shared(x + row, xr);
    ptx::store_shared(y + row, yr);
  }
  x = v + first * l;
  y = v + second * l;
#pragma unroll 4
  for (int row = lane; row < l; row += 32) {
    float xr = load<SHARED_V>(x + row);
    float yr = load<SHARED_V>(y + row);
    rotate(xr, yr, by);
    store<SHARED_V>(x + row, xr);
    store<SHARED_V>(y + row, yr);
  }
  return true;
}

// A unit column in place of the zero column c, orthogonal to all others: the next coordinate vector
// that is not nearly in their span, less its projection on them, twice. Over all coordinate vectors
// the squared distances from a span of r columns sum to p − r >= 1, and those passed over had less
// than 1/2 together: so there is always a next one.
__device__ __forceinline__ void complete(float* a, float* projection, int c, int& candidate, int p,
                                         int l) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  float* const w = a + c * p;
  for (; candidate < p - 1; ++candidate) {
    double inside[1] = {0.0};
    for (int k = lane; k < l; k += 32) {
      if (k == c) continue;  // other warps may be at its first pass
      const double u = static_cast<double>(ptx::load_shared(a + k * p + candidate));
      inside[0] += u * u;
    }
    ptx::warp_sum(inside);
    if ((1.0 - inside[0]) * (2 * p) >= 1.0) break;
  }
  for (int row = threadIdx.x; row < p; row += blockDim.x) {
    float rest = row == candidate ? 1.0f : 0.0f;
    for (int k = 0; k < l; ++k) {
      if (k == c) continue;
      rest -= ptx::load_shared(a + k * p + row) * ptx::load_shared(a + k * p + candidate);
    }
    ptx::store_shared(w + row, rest);
  }
  __syncthreads();
  for (int k = warp; k < l; k += warps) {
    const float part = k == c ? 0.0f : dot(a + k * p, w, p);
    if (lane == 0) ptx::store_shared(projection + k, part);
  }
  __syncthreads();
  for (int row = threadIdx.x; row < p; row += blockDim.x) {
    float rest = ptx::load_shared(w + row);
    for (int k = 0; k < l; ++k) {
      if (k == c) continue;
      rest -= ptx::load_shared(a + k * p + row) * ptx::load_shared(projection + k);
    }
    ptx::store_shared(w + row, rest);
  }
  __syncthreads();
  const float norm = sqrtf(dot(w, w, p));
  __syncthreads();
  for (int row = threadIdx.x; row < p; row += blockDim.x) {
    ptx::store_shared(w + row, ptx::load_shared(w + row) / norm);
  }
  __syncthreads();
}

}  // namespace jacobi

template <bool SHARED_V>
__global__ __launch_bounds__(kJacobiThreads,
                             1) void jacobi_kernel(OSF_GRID_CONSTANT(JacobiParams) params) {
  using namespace jacobi;
  const int p = params.p, l = params.l;
  const int thread = threadIdx.x, threads = blockDim.x;
  const int lane = thread % 32, warp = thread / 32, warps = threads / 32;

  float* const a = reinterpret_cast<float*>(ptx::shared_memory());      // (l, p)
  float* const v = SHARED_V ? a + l * p : matrix_of(params.Vt, l * l);  // (l, l)
  float* const norms = a + l * p + (SHARED_V ? l * l : 0);              // (l)
  int* const ranks = reinterpret_cast<int*>(norms + l);                 // (l); warps <= l
  uint32_t* const by_warp = reinterpret_cast<uint32_t*>(ranks);         // (warps)

  const float* const M = params.M + blockIdx.x * params.M_stride[0];
  uint32_t most = 0;
  for (int e = thread; e < p * l; e += threads) {
    const int row = e / l, column = e % l;
    const float x = ptx::load_global(M + row * params.M_stride[1] + column * params.M_stride[2]);
    ptx::store_shared(a + column * p + row, x);
    most = max(most, ptx::float_to_bits(x) & 0x7fffffffu);
  }
  most = ptx::warp_max(most);
  if (lane == 0) ptx::store_shared(by_warp + warp, most);
  __syncthreads();
  for (int w = 0; w < warps; ++w) most = max(most, ptx::load_shared(by_warp + w));

  if (most >= 0x7f800000u) {
    const float nan = ptx::bits_to_float(kNaN);
    float* const Ut = matrix_of(params.Ut, l * p);
    float* const Vt = matrix_of(params.Vt, l * l);
    for (int e = thread; e < l * p; e += threads) ptx::store_global(Ut + e, nan);
    for (int e = thread; e < l * l; e += threads) ptx::store_global(Vt + e, nan);
    for (int e = thread; e < l; e += threads) ptx::store_global(matrix_of(params.S, l) + e, nan);
    if (thread == 0) ptx::store_global(params.info + blockIdx.x, -1);
    return;
  }
  const int shift = most == 0 ? 0 : scaled_exponent(p, l) - exponent_above(most);
  const double scale = power_of_two(shift);
  for (int e = thread; e < p * l; e += threads) {
    const double x = static_cast<double>(ptx::load_shared(a + e));
    ptx::store_shared(a + e, static_cast<float>(x * scale));
  }
  for (int e = thread; e < l * l; e += threads)
    store<SHARED_V>(v + e, e / l == e % l ? 1.0f : 0.0f);
  triangularize<SHARED_V>(a, v, norms, by_warp, p, l);

  // Of an even number of players the last stands still; one that is not there sits out its pair.
  const int players = l + l % 2;
  bool converged = false;
  for (int sweep = 0; sweep < kSweeps && !converged; ++sweep) {
    bool turned = false;
    for (int round = 0; round < players - 1; ++round) {
      for (int pair = warp; pair < players / 2; pair += warps) {
        const int i = (round + pair) % (players - 1);
        const int j = pair == 0 ? players - 1 : (round - pair + players - 1) % (players - 1);
        if (max(i, j) < l && orthogonalize<SHARED_V>(a, v, i, j, params)) {
          turned = true;
        }
      }
      __syncthreads();
    }
    if (lane == 0) ptx::store_shared(by_warp + warp, static_cast<uint32_t>(turned));
    __syncthreads();
    converged = true;
    for (int w = 0; w < warps; ++w) {
      if (ptx::load_shared(by_warp + w) != 0) converged = false;
    }
  }

  for (int column = warp; column < l; column += warps) {
    float* const x = a + column * p;
    double square[1] = {0.0};
    for (int row = lane; row < p; row += 32) {
      const double xr = static_cast<double>(ptx::load_shared(x + row));
      square[0] += xr * xr;
    }
    ptx::warp_sum(square);
    const double norm = sqrt(square[0]);
    if (lane == 0) ptx::store_shared(norms + column, static_cast<float>(norm));
    if (norm == 0.0) continue;
    const double unit = 1.0 / norm;
    for (int row = lane; row < p; row += 32) {
      const double xr = static_cast<double>(ptx::load_shared(x + row));
      ptx::store_shared(x + row, static_cast<float>(xr * unit));
    }
  }
  __syncthreads();

  // Where each column goes; as its complement where it is zero. Afterwards `norms` is free.
  for (int column = thread; column < l; column += threads) {
    const float norm = ptx::load_shared(norms + column);
    int rank = 0;
    for (int other = 0; other < l; ++other) {
      const float its = ptx::load_shared(norms + other);
      if (its > norm || (its == norm && other < column)) ++rank;
    }
    ptx::store_shared(ranks + column, norm > 0.0f ? rank : ~rank);
    ptx::store_global(matrix_of(params.S, l) + rank,
                      static_cast<float>(static_cast<double>(norm) * power_of_two(-shift)));
  }
  __syncthreads();
  int candidate = 0;
  for (int column = 0; column < l; ++column) {
    if (ptx::load_shared(ranks + column) < 0) complete(a, norms, column, candidate, p, l);
  }

  for (int column = warp; column < l; column += warps) {
    const int rank = ptx::load_shared(ranks + column);
    const int64_t line = rank < 0 ? ~rank : rank;
    for (int row = lane; row < p; row += 32) {
      ptx::store_global(matrix_of(params.Ut, l * p) + line * p + row,
                        ptx::load_shared(a + column * p + row));
    }
  }
  if (!SHARED_V) {  // the lines change places by way of the columns' memory
    __syncthreads();
    for (int e = thread; e < l * l; e += threads) ptx::store_shared(a + e, ptx::load_global(v + e));
    __syncthreads();
  }
  for (int column = warp; column < l; column += warps) {
    const int rank = ptx::load_shared(ranks + column);
    const int64_t line = rank < 0 ? ~rank : rank;
    for (int row = lane; row < l; row += 32) {
      const float x = ptx::load_shared((SHARED_V ? v : a) + column * l + row);
      ptx::store_global(matrix_of(params.Vt, l * l) + line * l + row, x);
    }
  }
  if (thread == 0) ptx::store_global(params.info + blockIdx.x, converged ? 0 : kSweeps);
}

template <bool SHARED_V>
void launch_jacobi(const JacobiParams& params, int blocks, int threads, cudaStream_t stream) {
  launch_blocks(jacobi_kernel<SHARED_V>, "jacobi", params, blocks, threads,
                static_cast<int>(jacobi_shared_bytes(params.p, params.l, SHARED_V)), stream);
}

}  // namespace osf
