// The persistent schedule: a launch has as many blocks as the machine holds at once, and block b
// takes the units b, b + gridDim.x, ... of all problems laid end to end (where blocks wait for each
// other, ordered.cuh, they claim units instead).
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace osf {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// The problem that `unit` belongs to: the last whose `begin` does not exceed it.
template <class Problem>
__device__ __forceinline__ const Problem& problem_of(const Params<Problem>& params, int unit,
                                                     int Problem::* begin = &Problem::unit_begin) {
  int low = 0, high = params.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (params.problem[middle].*begin <= unit) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return params.problem[low];
}

}  // namespace osf
