// Shared by the hosts of both kernels: jobs to operands, and lists of problems to launches.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "api.h"
#include "params.h"

namespace osf {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline MatrixRef transposed(MatrixRef a) {
  std::swap(a.stride0, a.stride1);
  return a;
}

inline int element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline bool half_precision(DType dtype) { return dtype == DType::bf16 || dtype == DType::f16; }

// The loaders' view of a matrix of (rows, columns).
inline Operand make_operand(const MatrixRef& a, int64_t rows, int64_t columns) {
  Operand o{};
  if (!a.present()) return o;
  o.data = a.data;
  o.stride[0] = a.stride0;
  o.stride[1] = a.stride1;
  o.dtype = static_cast<int8_t>(a.dtype);
  const bool by_rows = a.stride1 == 1, by_columns = a.stride0 == 1;
  o.inner = by_columns && (!by_rows || columns == 1) ? 0 : 1;

  const int size = element_bytes(a.dtype);
  o.vector_bytes = size == 4 ? 4 : 0;
  if (o.stride[o.inner] == 1) {
    const int64_t lines = o.inner ? rows : columns;
    const int64_t line_bytes = lines > 1 ? o.stride[1 - o.inner] * size : 0;
    for (const int width : {16, 8, 4}) {
      if (reinterpret_cast<uintptr_t>(a.data) % width == 0 && line_bytes % width == 0) {
        o.vector_bytes = static_cast<int8_t>(width);
        break;
      }
    }
  }
  return o;
}

inline void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(std::string("osf_kernels: ") + what);
}

// Tiles are counted in int: a side leaves room for the last tile to overhang.
inline void require_side(int64_t size, const char* what) {
  require(size >= 0 && size <= std::numeric_limits<int>::max() - 1024, what);
}

inline void require_matrix(const MatrixRef& a, const char* what) {
  require(a.dtype == DType::none || a.dtype == DType::bf16 || a.dtype == DType::f16 ||
              a.dtype == DType::f32,
          what);
}

// Gathers problems and calls `launch` whenever the kernel parameter is full.
template <class Problem>
class Batcher {
 public:
  using Launch = std::function<void(const Params<Problem>&)>;

  explicit Batcher(Launch launch, int* counters = nullptr)
      : launch_(std::move(launch)), params_(new Params<Problem>) {
    params_->count = params_->units = params_->sums = 0;
    params_->counters = counters;
  }

  void add(Problem problem, int64_t units, [[maybe_unused]] int64_t sums = 0) {
    if (units == 0 && sums == 0) return;
    constexpr int64_t kMost = std::numeric_limits<int>::max() / 2;
    require(units <= kMost && sums <= kMost, "one matrix has more tiles than a launch can count");
    if (params_->count == Params<Problem>::kCapacity || params_->units + units > kMost ||
        params_->sums + sums > kMost) {
      flush();
    }
    problem.unit_begin = params_->units;
    if constexpr (std::is_same_v<Problem, CoefficientsProblem>) problem.sum_begin = params_->sums;
    params_->problem[params_->count++] = problem;
    params_->units += static_cast<int>(units);
    params_->sums += static_cast<int>(sums);
  }

  void flush() {
    if (params_->count > 0) launch_(*params_);
    params_->count = params_->units = params_->sums = 0;
  }

 private:
  Launch launch_;
  std::unique_ptr<Params<Problem>> params_;
};

}  // namespace osf
