// What nvcc compiled this library with and for.
#include "api.h"

namespace osf {

#ifdef OSF_SIMT_EMULATOR
#define __CUDA_ARCH_LIST__ 0
#define OSF_COMPILER_VERSION 0
#else
#define OSF_COMPILER_VERSION (__CUDACC_VER_MAJOR__ * 1000 + __CUDACC_VER_MINOR__ * 10)
#endif

const int* compiled_architectures() {
  static const int architectures[] = {__CUDA_ARCH_LIST__, 0};
  return architectures;
}

#ifdef OSF_SIMT_EMULATOR
cudaError_t image_error() { return cudaSuccess; }
#else
namespace {
__global__ void empty_kernel() {}  // compiled for what all the others are
}  // namespace

cudaError_t image_error() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, empty_kernel);
  cudaGetLastError();
  return error;
}
#endif

int compiler_version() { return OSF_COMPILER_VERSION; }

}  // namespace osf
