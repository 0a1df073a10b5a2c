// out = Σ_slices part − offset: the partial sums of `coefficients`, in the order of the slices, so
// that two runs agree bit for bit.
#include "convert.cuh"
#include "launch.h"
#include "runtime.cuh"

namespace osf {

__global__ __launch_bounds__(kThreads) void reduce_kernel(OSF_GRID_CONSTANT(Params<ReduceProblem>)
                                                              params) {
  constexpr int kBatch = 8;  // loads in flight before the first is added
  for (int unit = blockIdx.x; unit < params.units; unit += gridDim.x) {
    const ReduceProblem& p = problem_of(params, unit);
    const int64_t elements = static_cast<int64_t>(p.rows) * p.cols;
    const int64_t first = static_cast<int64_t>(unit - p.unit_begin) * kReduceElements;
    for (int i = threadIdx.x; i < kReduceElements && first + i < elements; i += kThreads) {
      const int row = static_cast<int>((first + i) / p.cols);
      const int column = static_cast<int>((first + i) % p.cols);
      const float* const part = p.part + static_cast<int64_t>(row) * p.ld + column;
      float sum = 0.0f;
      int slice = 0;
      for (; slice + kBatch <= p.slices; slice += kBatch) {
        float v[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          v[j] = ptx::load_global(part + (slice + j) * p.slice_stride);
        }
#pragma unroll
        for (int j = 0; j < kBatch; ++j) sum += v[j];
      }
      for (; slice < p.slices; ++slice) sum += ptx::load_global(part + slice * p.slice_stride);
      if (p.S != nullptr) {
        const float s = ptx::load_global(p.S + row * p.S_stride[0] + column * p.S_stride[1]);
        sum -= s * load_element(p.basis.data, p.basis.dtype,
                                row * p.basis.stride[0] + column * p.basis.stride[1]);
      }
      store_element(p.out, p.out_dtype, row * p.out_stride[0] + column * p.out_stride[1], sum);
    }
  }
}

void launch_reduce(const Params<ReduceProblem>& params, int multiprocessors, cudaStream_t stream) {
  launch(reduce_kernel, "reduce", params, 8 * multiprocessors, 0, stream);
}

}  // namespace osf
