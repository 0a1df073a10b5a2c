// out = beta·x + alpha·(L1 R1 + L2 R2) + addend, one read of x and one write of out.
//
// A unit of work is a tile of out, whose sum stays in registers while chunks of both ranks stream
// through shared memory. A factor of another dtype than the product's (a float32 coefficient beside
// a bf16 basis) comes through registers: loaded before a chunk's product, rounded and stored after.
#pragma once

#include "launch.h"
#include "mma_traits.cuh"
#include "runtime.cuh"

namespace osf {

template <Math math>
struct UpdateTraits : MathTraits<math> {
  using Element = typename MathTraits<math>::Element;
  static constexpr int kRows = kUpdateRows, kColumns = kUpdateColumns, kChunk = 32;
  static constexpr int kStages = 4;
  static constexpr int kColumnWarps = 2;
  static constexpr int kWarpRows = kRows / (kWarps / kColumnWarps);
  static constexpr int kWarpColumns = kColumns / kColumnWarps;

  static constexpr int kLElements = kRows * kChunk;
  static constexpr int kRElements = kChunk * kColumns;
  // On its way out a warp's sum passes through shared memory, 16 rows at a time.
  static constexpr int kScratchLine = kWarpColumns + 4;
  static constexpr int kScratchElements = 16 * kScratchLine;
  static constexpr int kPipelineBytes = kStages * (kLElements + kRElements) * sizeof(Element);
  static constexpr int kScratchBytes = kWarps * kScratchElements * 4;
  static constexpr int kSharedBytes =
      kPipelineBytes > kScratchBytes ? kPipelineBytes : kScratchBytes;
};

// Eight neighbours of a row as they are stored: enough registers for float32.
struct Eight {
  uint32_t bits[8];
};

__device__ __forceinline__ void load_eight(Eight& e, const Operand& o, int row, int column,
                                           int valid) {
  const int64_t index = row * o.stride[0] + column * o.stride[1];
  if (o.inner == 1 && o.vector_bytes == 16 && valid == 8) {
    if (o.dtype == kF32) {
      const float* data = static_cast<const float*>(o.data) + index;
      const uint4 low = ptx::load_global(reinterpret_cast<const uint4*>(data));
      const uint4 high = ptx::load_global(reinterpret_cast<const uint4*>(data + 4));
      e.bits[0] = low.x, e.bits[1] = low.y, e.bits[2] = low.z, e.bits[3] = low.w;
      e.bits[4] = high.x, e.bits[5] = high.y, e.bits[6] = high.z, e.bits[7] = high.w;
    } else {
      const uint16_t* data = static_cast<const uint16_t*>(o.data) + index;
      const uint4 q = ptx::load_global(reinterpret_cast<const uint4*>(data));
      e.bits[0] = q.x, e.bits[1] = q.y, e.bits[2] = q.z, e.bits[3] = q.w;
    }
    return;
  }
  if (o.dtype == kF32) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      e.bits[j] =
          j < valid
              ? ptx::load_global(static_cast<const uint32_t*>(o.data) + index + j * o.stride[1])
              : 0u;
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const uint16_t* data = static_cast<const uint16_t*>(o.data) + index + j * o.stride[1];
      const uint32_t low = j < valid ? ptx::load_global(data) : uint16_t{0};
      const uint32_t high = j + 1 < valid ? ptx::load_global(data + o.stride[1]) : uint16_t{0};
      e.bits[j / 2] = low | high << 16;
    }
  }
}

__device__ __forceinline__ void add_eight(float (&sum)[8], float scale, const Eight& e, int dtype) {
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    float v[2];
    if (dtype == kF32) {
      v[0] = ptx::bits_to_float(e.bits[j]), v[1] = ptx::bits_to_float(e.bits[j + 1]);
    } else {
      unpack(v, e.bits[j / 2], dtype);
    }
    sum[j] += scale * v[0];
    sum[j + 1] += scale * v[1];
  }
}

__device__ __forceinline__ void store_eight(const Operand& o, int row, int column, int valid,
                                            const float (&v)[8]) {
  void* const out = const_cast<void*>(o.data);
  const int64_t index = row * o.stride[0] + column * o.stride[1];
  if (o.inner == 1 && o.vector_bytes == 16 && valid == 8) {
    if (o.dtype == kF32) {
      float4* data = reinterpret_cast<float4*>(static_cast<float*>(out) + index);
      ptx::store_global(data, make_float4(v[0], v[1], v[2], v[3]));
      ptx::store_global(data + 1, make_float4(v[4], v[5], v[6], v[7]));
    } else {
      uint4* data = reinterpret_cast<uint4*>(static_cast<uint16_t*>(out) + index);
      ptx::store_global(data, make_uint4(pack(v[0], v[1], o.dtype), pack(v[2], v[3], o.dtype),
                                         pack(v[4], v[5], o.dtype), pack(v[6], v[7], o.dtype)));
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (j < valid) store_element(out, o.dtype, index + j * o.stride[1], v[j]);
  }
}

template <class Traits>
__device__ __forceinline__ void write_out(
    const UpdateProblem& p, int row0, int column0,
    const Accumulators<Traits::kWarpRows / 16, Traits::kWarpColumns / 16>& acc) {
  constexpr int kLine = Traits::kScratchLine;
  constexpr int kLanesALine = Traits::kWarpColumns / 8, kLines = 32 / kLanesALine;
  constexpr int kSteps = 16 / kLines;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* const scratch =
      reinterpret_cast<float*>(ptx::shared_memory()) + warp * Traits::kScratchElements;
  row0 += warp / Traits::kColumnWarps * Traits::kWarpRows;
  column0 += warp % Traits::kColumnWarps * Traits::kWarpColumns;
  const int column = column0 + lane % kLanesALine * 8;
  const int valid_columns = min(8, max(0, p.n - column));

#pragma unroll
  for (int i = 0; i < Traits::kWarpRows / 16; ++i) {
    const int first_row = row0 + 16 * i + lane / kLanesALine;
    Eight x[kSteps];
    if (p.x.dtype != kNone) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int row = first_row + s * kLines;
        if (row < p.m) load_eight(x[s], p.x, row, column, valid_columns);
      }
    }
#pragma unroll
    for (int j = 0; j < Traits::kWarpColumns / 8; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        ptx::store_shared(
            reinterpret_cast<float2*>(scratch + (lane / 4 + 8 * h) * kLine + 8 * j + lane % 4 * 2),
            make_float2(acc.v[i][j][2 * h], acc.v[i][j][2 * h + 1]));
      }
    }
    __syncwarp();
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int row = first_row + s * kLines;
      const float* const line =
          scratch + (lane / kLanesALine + s * kLines) * kLine + lane % kLanesALine * 8;
      const float4 low = ptx::load_shared(reinterpret_cast<const float4*>(line));
      const float4 high = ptx::load_shared(reinterpret_cast<const float4*>(line + 4));
      float sum[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[j] *= p.alpha;
      if (row < p.m && valid_columns > 0) {
        if (p.x.dtype != kNone) add_eight(sum, p.beta, x[s], p.x.dtype);
        if (p.addend.dtype != kNone) {
          Eight addend;
          load_eight(addend, p.addend, row, column, valid_columns);
          add_eight(sum, 1.0f, addend, p.addend.dtype);
        }
        store_eight(p.out, row, column, valid_columns, sum);
      }
    }
    __syncwarp();
  }
}

template <class Traits>
__global__ __launch_bounds__(kThreads,
                             1) void update_kernel(OSF_GRID_CONSTANT(Params<UpdateProblem>)
                                                       params) {
  using T = typename Traits::Element;
  constexpr int ROWS = Traits::kRows, COLUMNS = Traits::kColumns, CHUNK = Traits::kChunk;
  constexpr int STAGES = Traits::kStages;
  using LoadL = TileLoader<T, ROWS, CHUNK, kThreads>;
  using LoadR = TileLoader<T, CHUNK, COLUMNS, kThreads>;

  T* const shared_l = reinterpret_cast<T*>(ptx::shared_memory());
  T* const shared_r = shared_l + STAGES * Traits::kLElements;
  const int warp = threadIdx.x / 32;

  for (int unit = blockIdx.x; unit < params.units; unit += gridDim.x) {
    const UpdateProblem& p = problem_of(params, unit);
    const int local = unit - p.unit_begin;
    const int row0 = local / p.column_tiles * ROWS, column0 = local % p.column_tiles * COLUMNS;
    const int chunks0 = (p.rank[0] + CHUNK - 1) / CHUNK;
    const int chunks = chunks0 + (p.rank[1] + CHUNK - 1) / CHUNK;

    // The epilogue finds x in L2 by then.
    if (p.x.dtype != kNone && p.x.inner == 1) {
      const int row = row0 + static_cast<int>(threadIdx.x) / 2;
      const int column = column0 + static_cast<int>(threadIdx.x) % 2 * (COLUMNS / 2);
      if (row < p.m && column < p.n) {
        const int64_t index = row * p.x.stride[0] + column * p.x.stride[1];
        ptx::prefetch_l2(static_cast<const char*>(p.x.data) + index * (p.x.dtype == kF32 ? 4 : 2));
      }
    }

    auto l_at = [&](int c) {
      return make_tile<T, ROWS, CHUNK>(shared_l + c % STAGES * Traits::kLElements,
                                       p.L[c >= chunks0]);
    };
    auto r_at = [&](int c) {
      return make_tile<T, CHUNK, COLUMNS>(shared_r + c % STAGES * Traits::kRElements,
                                          p.R[c >= chunks0]);
    };
    // One operand of a chunk may be on its way in registers: the coefficient, which is R in the
    // first term and L in the second. A basis that cannot come by cp.async is loaded at once.
    typename LoadL::Held held;
    auto begin_load = [&](int c) {
      const int term = c >= chunks0, rank0 = (c - (term ? chunks0 : 0)) * CHUNK;
      const typename LoadL::Region l_region(p.L[term], row0, rank0, p.m, p.rank[term]);
      const typename LoadR::Region r_region(p.R[term], rank0, column0, p.rank[term], p.n);
      if (term == 0) {
        LoadL::load(l_at(c), p.L[0], l_region);
        if (is_async<T>(p.R[0])) {
          LoadR::issue(r_at(c), p.R[0], r_region);
        } else {
          LoadR::fetch(held, r_at(c), p.R[0], r_region);
        }
      } else {
        LoadR::load(r_at(c), p.R[1], r_region);
        if (is_async<T>(p.L[1])) {
          LoadL::issue(l_at(c), p.L[1], l_region);
        } else {
          LoadL::fetch(held, l_at(c), p.L[1], l_region);
        }
      }
    };
    auto end_load = [&](int c) {
      if (c < chunks0) {
        if (!is_async<T>(p.R[0])) LoadR::store(r_at(c), held);
      } else {
        if (!is_async<T>(p.L[1])) LoadL::store(l_at(c), held);
      }
    };

#pragma unroll
    for (int c = 0; c < STAGES - 1; ++c) {
      if (c < chunks) {
        begin_load(c);
        end_load(c);
      }
      ptx::cp_async_commit();
    }

    Accumulators<Traits::kWarpRows / 16, Traits::kWarpColumns / 16> acc;
    acc.clear();
    for (int c = 0; c < chunks; ++c) {
      ptx::cp_async_wait<STAGES - 2>();
      __syncthreads();  // chunk c is there for all, and all are done with chunk c - 1
      const int next = c + STAGES - 1;
      if (next < chunks) begin_load(next);
      ptx::cp_async_commit();
      multiply<Traits, CHUNK>(acc, l_at(c), warp / Traits::kColumnWarps * Traits::kWarpRows, 1,
                              r_at(c), warp % Traits::kColumnWarps * Traits::kWarpColumns, 0);
      if (next < chunks) end_load(next);
    }
    __syncthreads();  // write_out overwrites the stages
    write_out<Traits>(p, row0, column0, acc);
    __syncthreads();  // the next unit overwrites what write_out holds there
  }
}

template <Math math>
void launch_update(const Params<UpdateProblem>& params, int multiprocessors, cudaStream_t stream) {
  using Traits = UpdateTraits<math>;
  launch(update_kernel<Traits>, "update", params, multiprocessors, Traits::kSharedBytes, stream);
}

}  // namespace osf
