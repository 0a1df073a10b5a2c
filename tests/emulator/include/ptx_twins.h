// Host twins of csrc/ptx.cuh: the same names, the same results but for the order and the last bits
// of a sum, and the same lanes holding them (PTX ISA, sections on ldmatrix and on mma.m16n8k8 and
// mma.m16n8k16).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "simt.h"

#define OSF_GRID_CONSTANT(T) const T&

namespace osf::ptx {

inline unsigned char* shared_memory() { return simt::shared_memory(); }

template <int BYTES>
inline void cp_async(void* shared, const void* global, int valid_bytes) {
  static_assert(BYTES == 16 || BYTES == 8 || BYTES == 4, "sizes of cp.async");
  simt::copy_async(shared, global, BYTES, valid_bytes);
}
inline void cp_async_commit() { simt::copy_commit(); }
template <int PENDING>
inline void cp_async_wait() {
  simt::copy_wait(PENDING);
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t to_tf32(float value) {
  const uint32_t bits = float_to_bits(value);
  if (std::isnan(value)) return 0x7fffffffu;
  if (std::isinf(value)) return bits;
  return (bits + 0x1000u) & ~0x1fffu;
}

inline uint16_t round_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline uint16_t round_f16(float value) {
  if (std::isnan(value)) return 0x7fff;
  const uint16_t sign = static_cast<uint16_t>(float_to_bits(value) >> 16 & 0x8000u);
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return sign | 0x7c00;  // halfway to the next power rounds to infinity
  // The spacing of fp16 numbers here; ten fraction bits, and 2^-24 below the normal numbers.
  int exponent = -13;
  if (magnitude >= 0x1p-14f) std::frexp(magnitude, &exponent);
  const int spacing = exponent - 11;
  const float steps = std::nearbyint(std::ldexp(magnitude, -spacing));  // ties to even
  const uint32_t count = static_cast<uint32_t>(steps);
  if (spacing == -24) return static_cast<uint16_t>(sign | count);
  return static_cast<uint16_t>(sign | (((spacing + 25) << 10) + (count - 1024)));
}

inline float f16_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 0x1f, fraction = bits & 0x3ff;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
}

inline uint32_t pack_bf16(float first, float second) {
  return round_bf16(first) | static_cast<uint32_t>(round_bf16(second)) << 16;
}
inline uint32_t pack_f16(float first, float second) {
  return round_f16(first) | static_cast<uint32_t>(round_f16(second)) << 16;
}

inline void prefetch_l2(const void*) {}

template <class T>
inline T load_global(const T* p) {
  simt::global_access(p, sizeof(T), sizeof(T), false);
  return *p;
}
template <class T>
inline void store_global(T* p, T value) {
  simt::global_access(p, sizeof(T), sizeof(T), true);
  *p = value;
}
template <class T>
inline void publish(T* p, T value) {
  simt::publish(p, &value, sizeof(T));
}
inline float4 load_published(const float4* p) { return load_global(p); }
inline void fence() { simt::fence(); }
inline int increment(int* p) {
  simt::atomic_access(p);
  return (*p)++;
}
inline int load_acquire(const int* p) {
  simt::global_access(p, sizeof(int), sizeof(int), false);
  return *p;
}
inline void pause() { simt::pause(); }

template <class T>
inline T load_shared(const T* p) {
  simt::shared_access(p, sizeof(T), sizeof(T));
  return *p;
}
template <class T>
inline void store_shared(T* p, T value) {
  simt::shared_access(p, sizeof(T), sizeof(T));
  *p = value;
}

template <int N>
inline void warp_sum(double (&value)[N]) {
  simt::warp_collective("warp_sum", value, [](void* const* lanes) {
    const auto lane = [&](int i) { return static_cast<double*>(lanes[i]); };
    for (int mask = 16; mask > 0; mask /= 2) {
      for (int n = 0; n < N; ++n) {
        double before[32];
        for (int i = 0; i < 32; ++i) before[i] = lane(i)[n];
        for (int i = 0; i < 32; ++i) lane(i)[n] = before[i] + before[i ^ mask];
      }
    }
  });
}

inline uint32_t warp_max(uint32_t value) {
  simt::warp_collective("warp_max", &value, [](void* const* lanes) {
    uint32_t most = 0;
    for (int i = 0; i < 32; ++i) most = std::max(most, *static_cast<uint32_t*>(lanes[i]));
    for (int i = 0; i < 32; ++i) *static_cast<uint32_t*>(lanes[i]) = most;
  });
  return value;
}

struct LdmatrixLane {
  uint32_t* r;
  const void* line;
  bool transposed;
};

inline void ldmatrix_x4(uint32_t (&r)[4], const void* line, bool transposed) {
  simt::shared_access(line, 16, 16);
  LdmatrixLane self{r, line, transposed};
  simt::warp_collective("ldmatrix", &self, [](void* const* lanes) {
    const auto lane = [&](int i) -> LdmatrixLane& { return *static_cast<LdmatrixLane*>(lanes[i]); };
    for (int i = 0; i < 32; ++i) {
      if (lane(i).transposed != lane(0).transposed) {
        throw simt::Error("ldmatrix: lanes disagree on the transposition");
      }
    }
    for (int block = 0; block < 4; ++block) {
      uint16_t element[8][8];
      for (int row = 0; row < 8; ++row) {
        std::memcpy(element[row], lane(8 * block + row).line, 16);
      }
      for (int i = 0; i < 32; ++i) {
        const int row = i / 4, column = 2 * (i % 4);
        const uint16_t low = lane(0).transposed ? element[column][row] : element[row][column];
        const uint16_t high =
            lane(0).transposed ? element[column + 1][row] : element[row][column + 1];
        lane(i).r[block] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  });
}

struct MmaLane {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

// Toward zero, as tensor cores round what they add to (Fasi, Higham, Mikaitis and Pranesh 2021).
inline float truncated(double value) {
  const float nearest = static_cast<float>(value);
  const bool away = std::isfinite(nearest) && std::fabs(nearest) > std::fabs(value);
  return away ? bits_to_float(float_to_bits(nearest) - 1) : nearest;
}

// d += a b, the products exact and their sum with d truncated once: the machine cuts off a little
// more, between products. `value(bits, half)` reads an element out of a register; PACKED is the
// number of elements in one.
template <int PACKED, class Value>
inline void mma(void* const* lanes, Value value) {
  constexpr int DEPTH = 8 * PACKED;
  double a[16][DEPTH], b[DEPTH][8];
  for (int i = 0; i < 32; ++i) {
    const MmaLane& lane = *static_cast<MmaLane*>(lanes[i]);
    const int group = i / 4, quad = i % 4;
    for (int e = 0; e < PACKED; ++e) {
      const int k = PACKED * quad + e;
      for (int half = 0; half < 2; ++half) {
        const int depth = k + half * 4 * PACKED;
        a[group][depth] = value(lane.a[2 * half], e);
        a[group + 8][depth] = value(lane.a[2 * half + 1], e);
        b[depth][group] = value(lane.b[half], e);
      }
    }
  }
  for (int i = 0; i < 32; ++i) {
    const MmaLane& lane = *static_cast<MmaLane*>(lanes[i]);
    for (int c = 0; c < 4; ++c) {
      const int row = i / 4 + 8 * (c / 2), column = 2 * (i % 4) + c % 2;
      double sum = lane.d[c];
      for (int k = 0; k < DEPTH; ++k) sum += a[row][k] * b[k][column];
      lane.d[c] = truncated(sum);
    }
  }
}

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaLane self{d, a, {b0, b1}};
  simt::warp_collective("mma.bf16", &self, [](void* const* lanes) {
    mma<2>(lanes, [](uint32_t bits, int high) {
      return bits_to_float(high ? bits & 0xffff0000u : bits << 16);
    });
  });
}

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaLane self{d, a, {b0, b1}};
  simt::warp_collective("mma.f16", &self, [](void* const* lanes) {
    mma<2>(lanes, [](uint32_t bits, int high) {
      return f16_to_float(static_cast<uint16_t>(high ? bits >> 16 : bits & 0xffffu));
    });
  });
}

inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaLane self{d, a, {b0, b1}};
  simt::warp_collective("mma.tf32", &self, [](void* const* lanes) {
    // The machine does not read the bits that tf32 lacks.
    mma<1>(lanes, [](uint32_t bits, int) { return bits_to_float(bits & ~0x1fffu); });
  });
}

}  // namespace osf::ptx
