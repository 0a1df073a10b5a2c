// The one place that calls the CUDA runtime to launch a kernel.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "schedule.cuh"

namespace osf {

inline void check(cudaError_t error, const std::string& call) {
  if (error != cudaSuccess) {
    throw std::runtime_error("osf_kernels: " + call + " failed: " + cudaGetErrorString(error));
  }
}

template <class Parameter>
void launch_blocks(void (*kernel)(OSF_GRID_CONSTANT(Parameter)), const char* name,
                   const Parameter& params, int blocks, int threads, int shared_bytes,
                   cudaStream_t stream) {
#ifdef OSF_SIMT_EMULATOR
  simt::launch(name, blocks, threads, shared_bytes, [&] { kernel(params); });
  (void)stream;
#else
  const void* entry = reinterpret_cast<const void*>(kernel);
  check(cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        std::string("cudaFuncSetAttribute(") + name + ")");
  void* arguments[] = {const_cast<Parameter*>(&params)};
  check(cudaLaunchKernel(entry, dim3(blocks), dim3(threads), arguments, shared_bytes, stream),
        std::string("cudaLaunchKernel(") + name + ")");
#endif
}

template <class Problem>
void launch(void (*kernel)(OSF_GRID_CONSTANT(Params<Problem>)), const char* name,
            const Params<Problem>& params, int resident_blocks, int shared_bytes,
            cudaStream_t stream) {
  const int blocks = std::min(std::max(params.units, params.sums), resident_blocks);
  if (blocks == 0) return;
  launch_blocks(kernel, name, params, blocks, kThreads, shared_bytes, stream);
}

}  // namespace osf
