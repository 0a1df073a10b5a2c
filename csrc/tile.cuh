// Tiles in shared memory: their swizzled layout, and the two ways a tile comes there.
//
// A tile keeps the memory order of its matrix, so row-major and column-major matrices (V is often a
// view Vh.mT) are both read in 16-byte pieces, and nothing is transposed on the way.
#pragma once

#include "convert.cuh"

namespace osf {

__host__ __device__ constexpr int log2_of(int n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }

// Where element (line, position along the line) lies. The 16-byte pieces of a line are permuted by
// an exclusive or with the line's number, so that eight lines at one position fall into eight
// different groups of banks.
template <class T>
struct Layout {
  static constexpr int kPiece = 16 / sizeof(T);  // elements
  int log2_line;                                 // elements a line

  __device__ __forceinline__ int offset(int line, int position) const {
    // A line of 64 bytes has four pieces: two lines share the 128 bytes that span all banks.
    const int phase = (1 << log2_line) * sizeof(T) >= 128 ? (line & 7) : ((line >> 1) & 3);
    const int piece = (position / kPiece) ^ phase;
    return (line << log2_line) + piece * kPiece + position % kPiece;
  }
};

// A (ROWS, COLUMNS) tile of a matrix; `inner` is the dimension along its lines.
template <class T>
struct Tile {
  T* data;
  Layout<T> layout;
  int inner;
};

template <class T, int ROWS, int COLUMNS>
__device__ __forceinline__ Tile<T> make_tile(T* data, const Operand& operand) {
  static_assert(ROWS * sizeof(T) >= 64 && COLUMNS * sizeof(T) >= 64, "four pieces a line");
  return {data, {operand.inner ? log2_of(COLUMNS) : log2_of(ROWS)}, operand.inner};
}

// True when the tile can come by cp.async: no conversion, and pieces of at least 4 bytes.
template <class T>
__device__ __forceinline__ bool is_async(const Operand& operand) {
  return operand.dtype == DtypeOf<T>::value && operand.vector_bytes >= 4;
}

// A thread's share of a tile on its way through registers, in groups of four elements.
template <int GROUPS>
struct HeldGroups {
  float v[GROUPS][4];
};

// Brings the (ROWS, COLUMNS) tile of `operand` that starts at (row, column). What lies outside
// (rows, columns) becomes zero.
template <class T, int ROWS, int COLUMNS, int THREADS>
struct TileLoader {
  static constexpr int kPiece = 16 / sizeof(T);
  static constexpr int kPieces = ROWS * COLUMNS / kPiece / THREADS;
  static constexpr int kGroups = ROWS * COLUMNS / 4 / THREADS;  // of four elements
  static_assert(kPieces * kPiece * THREADS == ROWS * COLUMNS, "every thread moves whole pieces");

  struct Region {
    int line0, position0, lines, length;
    int64_t line_stride, stride;

    __device__ __forceinline__ Region(const Operand& o, int row, int column, int rows, int columns)
        : line0(o.inner ? row : column),
          position0(o.inner ? column : row),
          lines(o.inner ? rows : columns),
          length(o.inner ? columns : rows),
          line_stride(o.stride[o.inner ? 0 : 1]),
          stride(o.stride[o.inner ? 1 : 0]) {}

    // How many of `count` elements from (line, position) on exist.
    __device__ __forceinline__ int valid(int line, int position, int count) const {
      if (line0 + line >= lines) return 0;
      const int left = length - (position0 + position);
      return left < 0 ? 0 : (left < count ? left : count);
    }
    __device__ __forceinline__ int64_t index(int line, int position) const {
      return (line0 + line) * line_stride + (position0 + position) * stride;
    }
  };

  // By cp.async; the caller commits and waits.
  static __device__ __forceinline__ void issue(const Tile<T>& tile, const Operand& operand,
                                               const Region& region) {
    const T* data = static_cast<const T*>(operand.data);
    const int log2_pieces = tile.layout.log2_line - log2_of(kPiece);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int piece = threadIdx.x + i * THREADS;
      const int line = piece >> log2_pieces;
      const int position = (piece & ((1 << log2_pieces) - 1)) * kPiece;
      T* shared = tile.data + tile.layout.offset(line, position);
      const int valid = region.valid(line, position, kPiece);
      // A piece without elements still needs an address that may be named.
      const T* global = valid > 0 ? data + region.index(line, position) : data;
      constexpr int size = sizeof(T);
      if (operand.vector_bytes == 16) {
        ptx::cp_async<16>(shared, global, valid * size);
      } else if (operand.vector_bytes == 8) {
        issue_parts<8>(shared, global, data, valid, 1);
      } else {
        issue_parts<4>(shared, global, data, valid, region.stride);
      }
    }
  }

  // By registers, converting to T. `fetch` and `store` are apart so that a product can run while
  // the loads are under way.
  using Held = HeldGroups<kGroups>;

  static __device__ __forceinline__ void fetch_group(float (&v)[4], const Tile<T>& tile,
                                                     const Operand& operand, const Region& region,
                                                     int i) {
    const int group = threadIdx.x + i * THREADS;
    const int log2_groups = tile.layout.log2_line - 2;
    const int line = group >> log2_groups;
    const int position = (group & ((1 << log2_groups) - 1)) * 4;
    const int valid = region.valid(line, position, 4);
    if (valid == 4 && operand.vector_bytes >= (operand.dtype == kF32 ? 16 : 8)) {
      load_four(v, operand.data, operand.dtype, region.index(line, position));
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        v[j] = j < valid
                   ? load_element(operand.data, operand.dtype, region.index(line, position + j))
                   : 0.0f;
      }
    }
  }

  static __device__ __forceinline__ void store_group(const Tile<T>& tile, const float (&v)[4],
                                                     int i) {
    const int group = threadIdx.x + i * THREADS;
    const int log2_groups = tile.layout.log2_line - 2;
    const int line = group >> log2_groups;
    const int position = (group & ((1 << log2_groups) - 1)) * 4;
    T* shared = tile.data + tile.layout.offset(line, position);
    if constexpr (sizeof(T) == 4) {
      ptx::store_shared(reinterpret_cast<float4*>(shared), make_float4(v[0], v[1], v[2], v[3]));
    } else {
      constexpr int dtype = DtypeOf<T>::value;
      ptx::store_shared(reinterpret_cast<uint2*>(shared),
                        make_uint2(pack(v[0], v[1], dtype), pack(v[2], v[3], dtype)));
    }
  }

  static __device__ __forceinline__ void fetch(Held& held, const Tile<T>& tile,
                                               const Operand& operand, const Region& region) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) fetch_group(held.v[i], tile, operand, region, i);
  }

  static __device__ __forceinline__ void store(const Tile<T>& tile, const Held& held) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) store_group(tile, held.v[i], i);
  }

  // Either way, whole: what comes by registers is in shared memory on return.
  static __device__ __forceinline__ void load(const Tile<T>& tile, const Operand& operand,
                                              const Region& region) {
    if (is_async<T>(operand)) {
      issue(tile, operand, region);
    } else {
#pragma unroll 2
      for (int i = 0; i < kGroups; ++i) {
        float v[4];
        fetch_group(v, tile, operand, region, i);
        store_group(tile, v, i);
      }
    }
  }

 private:
  template <int BYTES>
  static __device__ __forceinline__ void issue_parts(T* shared, const T* global, const T* data,
                                                     int valid, int64_t stride) {
    constexpr int count = BYTES / sizeof(T);
#pragma unroll
    for (int j = 0; j < kPiece; j += count) {
      const int left = valid - j < 0 ? 0 : (valid - j < count ? valid - j : count);
      ptx::cp_async<BYTES>(shared + j, left > 0 ? global + j * stride : data,
                           left * static_cast<int>(sizeof(T)));
    }
  }
};

}  // namespace osf
