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

template <class Problem>
void launch(void (*kernel)(OSF_GRID_CONSTANT(Params<Problem>)), const char* name,
            const Params<Problem>& params, int resident_blocks, int shared_bytes,
            cudaStream_t stream) {
  if (params.units == 0) return;
  const int blocks = std::min(params.units, resident_blocks);
#ifdef OSF_SIMT_EMULATOR
  simt::launch(name, blocks, kThreads, shared_bytes, [&] { kernel(params); });
  (void)stream;
#else
  const void* entry = reinterpret_cast<const void*>(kernel);
  check(cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        std::string("cudaFuncSetAttribute(") + name + ")");
  void* arguments[] = {const_cast<Params<Problem>*>(&params)};
  check(cudaLaunchKernel(entry, dim3(blocks), dim3(kThreads), arguments, shared_bytes, stream),
        std::string("cudaLaunchKernel(") + name + ")");
#endif
}

}  // namespace osf
