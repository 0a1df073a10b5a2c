// The part of the CUDA runtime's host interface that csrc names, for g++ without CUDA.
#pragma once

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
struct CUstream_st;
using cudaStream_t = CUstream_st*;
inline const char* cudaGetErrorString(cudaError_t) { return "unknown"; }

// Kernel parameters of 32 KB.
#define CUDART_VERSION 13000
