// G = RᵀR and R⁻¹, one matrix a block, in the packed upper triangle alone: the factor overwrites G
// in shared memory and its inverse the factor, so that no second triangle limits l.
//
// Both run in panels of 8 rows. A panel's diagonal block is worked on in registers by every thread
// alike, its columns by a thread each; what a panel adds to the other rows is a product of 8 terms
// for 4 rows at a time, a warp each.
#include <cfloat>
#include <cmath>

#include "launch.h"
#include "runtime.cuh"

namespace osf {

namespace {

constexpr int kPanel = 8, kStrip = 4;

// Where (row, column) of the upper triangle lies: its rows one after another.
__device__ __forceinline__ int packed(int l, int row, int column) {
  return row * l - row * (row + 1) / 2 + column;
}

// The diagonal block of the panel at `first`, continued as the identity beyond the matrix.
__device__ __forceinline__ void load_diagonal(float (&d)[kPanel][kPanel], const float* a, int l,
                                              int first) {
#pragma unroll
  for (int row = 0; row < kPanel; ++row) {
#pragma unroll
    for (int column = row; column < kPanel; ++column) {
      d[row][column] = first + column < l
                           ? ptx::load_shared(a + packed(l, first + row, first + column))
                           : (row == column ? 1.0f : 0.0f);
    }
  }
}

// The factor of the block in its place, and one over its diagonal. Returns 0, or one more than the
// first pivot that is not positive and finite.
__device__ __forceinline__ int factor(float (&d)[kPanel][kPanel], float (&reciprocal)[kPanel]) {
  int failed = 0;
#pragma unroll
  for (int row = 0; row < kPanel; ++row) {
    const float pivot = d[row][row];
    if (failed == 0 && !(pivot > 0.0f && pivot <= FLT_MAX)) failed = row + 1;
    d[row][row] = sqrtf(pivot);
    reciprocal[row] = 1.0f / d[row][row];
#pragma unroll
    for (int column = row + 1; column < kPanel; ++column) d[row][column] *= reciprocal[row];
#pragma unroll
    for (int i = row + 1; i < kPanel; ++i) {
#pragma unroll
      for (int j = i; j < kPanel; ++j) d[i][j] -= d[row][i] * d[row][j];
    }
  }
  return failed;
}

// R in place of G. Returns as `factor` does, counted in the matrix; the same in all threads.
__device__ __forceinline__ int factorize(float* a, int l) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int first = 0; first < l; first += kPanel) {
    float d[kPanel][kPanel], reciprocal[kPanel];
    load_diagonal(d, a, l, first);
    const int failed = factor(d, reciprocal);
    if (failed != 0) return first + failed;
    __syncthreads();

    for (int j = first + threadIdx.x; j < l; j += blockDim.x) {
      float r[kPanel];
#pragma unroll
      for (int row = 0; row < kPanel; ++row) {
        if (first + row > j) break;
        float* const at = a + packed(l, first + row, j);
        float sum = ptx::load_shared(at);
#pragma unroll
        for (int k = 0; k < row; ++k) sum -= d[k][row] * r[k];
        r[row] = first + row == j ? d[row][row] : sum * reciprocal[row];
        ptx::store_shared(at, r[row]);
      }
    }
    __syncthreads();

    for (int i = first + kPanel + kStrip * warp; i < l; i += kStrip * warps) {
      float left[kStrip][kPanel];
#pragma unroll
      for (int row = 0; row < kStrip; ++row) {
#pragma unroll
        for (int k = 0; k < kPanel; ++k) {
          left[row][k] = i + row < l ? ptx::load_shared(a + packed(l, first + k, i + row)) : 0.0f;
        }
      }
      for (int j = i + lane; j < l; j += 32) {
        float right[kPanel];
#pragma unroll
        for (int k = 0; k < kPanel; ++k) {
          right[k] = ptx::load_shared(a + packed(l, first + k, j));
        }
#pragma unroll
        for (int row = 0; row < kStrip; ++row) {
          if (i + row > j) break;
          float* const at = a + packed(l, i + row, j);
          float sum = 0.0f;
#pragma unroll
          for (int k = 0; k < kPanel; ++k) sum += left[row][k] * right[k];
          ptx::store_shared(at, ptx::load_shared(at) - sum);
        }
      }
    }
    __syncthreads();
  }
  return 0;
}

// X = R⁻¹ in place of R, panels from the last to the first. Right of the panels done, a row i holds
// Σ R(i, k) X(k, j) over the rows k done.
__device__ __forceinline__ void invert(float* a, int l) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int first = (l - 1) / kPanel * kPanel; first >= 0; first -= kPanel) {
    const int behind = min(first + kPanel, l);
    float d[kPanel][kPanel];
    load_diagonal(d, a, l, first);
    __syncthreads();

    for (int j = first + threadIdx.x; j < l; j += blockDim.x) {
      float x[kPanel];
#pragma unroll
      for (int row = kPanel - 1; row >= 0; --row) {
        const int i = first + row;
        float* const at = a + packed(l, i, j);
        float sum = i == j ? 1.0f : 0.0f;
        if (j >= behind && i < behind) sum = -ptx::load_shared(at);
#pragma unroll
        for (int k = row + 1; k < kPanel; ++k) sum -= d[row][k] * x[k];
        x[row] = sum / d[row][row];
        if (i <= j && i < behind) ptx::store_shared(at, x[row]);
      }
    }
    __syncthreads();

    for (int i = kStrip * warp; i < first; i += kStrip * warps) {
      float left[kStrip][kPanel];
#pragma unroll
      for (int row = 0; row < kStrip; ++row) {
#pragma unroll
        for (int k = 0; k < kPanel; ++k) {
          left[row][k] = first + k < l ? ptx::load_shared(a + packed(l, i + row, first + k)) : 0.0f;
        }
      }
      __syncwarp();  // the columns just read are the first to be written
      for (int j = first + lane; j < l; j += 32) {
        float right[kPanel];
#pragma unroll
        for (int k = 0; k < kPanel; ++k) {
          right[k] =
              first + k <= min(j, l - 1) ? ptx::load_shared(a + packed(l, first + k, j)) : 0.0f;
        }
#pragma unroll
        for (int row = 0; row < kStrip; ++row) {
          float* const at = a + packed(l, i + row, j);
          float sum = j >= behind ? ptx::load_shared(at) : 0.0f;
#pragma unroll
          for (int k = 0; k < kPanel; ++k) sum += left[row][k] * right[k];
          ptx::store_shared(at, sum);
        }
      }
    }
  }
}

}  // namespace

__global__ __launch_bounds__(kCholeskyThreads) void cholesky_kernel(
    OSF_GRID_CONSTANT(CholeskyParams) params) {
  float* const a = reinterpret_cast<float*>(ptx::shared_memory());
  const int l = params.l;
  const int64_t matrix = blockIdx.x;
  const float* const G = params.G + matrix * params.G_stride[0];
  float* const inverse = params.inverse + matrix * l * l;

  for (int e = threadIdx.x; e < l * l; e += blockDim.x) {
    const int i = e / l, j = e % l;
    if (i > j) continue;
    ptx::store_shared(a + packed(l, i, j),
                      ptx::load_global(G + i * params.G_stride[1] + j * params.G_stride[2]));
  }
  __syncthreads();

  const int failed = factorize(a, l);
  if (failed == 0) invert(a, l);
  for (int e = threadIdx.x; e < l * l; e += blockDim.x) {
    const int i = e / l, j = e % l;
    float x = 0.0f;
    if (failed != 0) {
      x = ptx::bits_to_float(0x7fffffffu);
    } else if (i <= j) {
      x = ptx::load_shared(a + packed(l, i, j));
    }
    ptx::store_global(inverse + e, x);
  }
  if (threadIdx.x == 0) ptx::store_global(params.info + matrix, static_cast<int32_t>(failed));
}

void launch_cholesky(const CholeskyParams& params, int blocks, int threads, cudaStream_t stream) {
  launch_blocks(cholesky_kernel, "cholesky", params, blocks, threads,
                static_cast<int>(cholesky_shared_bytes(params.l)), stream);
}

}  // namespace osf
