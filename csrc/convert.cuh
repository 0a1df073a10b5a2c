// Elements of a matrix whose dtype is known at run time, as float32 and back.
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace osf {

template <class T>
struct DtypeOf;
template <>
struct DtypeOf<bf16> {
  static constexpr int8_t value = kBf16;
};
template <>
struct DtypeOf<f16> {
  static constexpr int8_t value = kF16;
};
template <>
struct DtypeOf<float> {
  static constexpr int8_t value = kF32;
};

__device__ __forceinline__ float bf16_to_float(uint32_t bits) {
  return ptx::bits_to_float(bits << 16);
}

__device__ __forceinline__ void unpack(float (&v)[2], uint32_t bits, int dtype) {
  if (dtype == kBf16) {
    v[0] = bf16_to_float(bits & 0xffffu);
    v[1] = ptx::bits_to_float(bits & 0xffff0000u);
  } else {
    v[0] = ptx::f16_to_float(static_cast<uint16_t>(bits & 0xffffu));
    v[1] = ptx::f16_to_float(static_cast<uint16_t>(bits >> 16));
  }
}

__device__ __forceinline__ uint32_t pack(float first, float second, int dtype) {
  return dtype == kBf16 ? ptx::pack_bf16(first, second) : ptx::pack_f16(first, second);
}

__device__ __forceinline__ float load_element(const void* data, int dtype, int64_t index) {
  if (dtype == kF32) return ptx::load_global(static_cast<const float*>(data) + index);
  const uint16_t bits = ptx::load_global(static_cast<const uint16_t*>(data) + index);
  return dtype == kBf16 ? bf16_to_float(bits) : ptx::f16_to_float(bits);
}

__device__ __forceinline__ void store_element(void* data, int dtype, int64_t index, float value) {
  if (dtype == kF32) {
    ptx::store_global(static_cast<float*>(data) + index, value);
  } else {
    ptx::store_global(static_cast<uint16_t*>(data) + index,
                      static_cast<uint16_t>(pack(value, 0.0f, dtype) & 0xffffu));
  }
}

// Four consecutive elements from an address that is aligned to all four.
__device__ __forceinline__ void load_four(float (&v)[4], const void* data, int dtype,
                                          int64_t index) {
  if (dtype == kF32) {
    const float4 q =
        ptx::load_global(reinterpret_cast<const float4*>(static_cast<const float*>(data) + index));
    v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
  } else {
    const uint2 q = ptx::load_global(
        reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(data) + index));
    float low[2], high[2];
    unpack(low, q.x, dtype);
    unpack(high, q.y, dtype);
    v[0] = low[0], v[1] = low[1], v[2] = high[0], v[3] = high[1];
  }
}

}  // namespace osf
