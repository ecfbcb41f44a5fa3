// A warp's 16 x 16 x 16 product of fp16 or bf16 tiles accumulated in fp32: tensor cores under nvcc, loops on the host.
//
//   WarpTileA<T> a; WarpTileB<T> b (row-major) or WarpTileB<T, true> b (stored as columns); WarpTileC c;
//   fill(c, 0.0f); load(a, pointer, ld); load(b, pointer, ld); multiply(c, a, b); store(pointer, c, ld);
//
// All 32 lanes call each function with the same arguments. Pointers are 32-byte aligned, ld is a multiple of 8 elements
// (of 4 for C). c.x[i], i < c.num_elements, are this lane's values, in an order that is the same for every tile.
#pragma once

#include "common/device.h"

#ifdef PYDL_SIMT
#include "pydl_simt/warp_matrix.h"
#else
#include <mma.h>

namespace pydl {

template <typename T>
using WarpTileA = nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, 16, T, nvcuda::wmma::row_major>;

template <bool Columns>
struct WarpTileLayout {
  using type = nvcuda::wmma::row_major;
};
template <>
struct WarpTileLayout<true> {
  using type = nvcuda::wmma::col_major;
};
template <typename T, bool Columns = false>
using WarpTileB = nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, 16, 16, 16, T, typename WarpTileLayout<Columns>::type>;

using WarpTileC = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float>;

__device__ inline void fill(WarpTileC& c, float value) { nvcuda::wmma::fill_fragment(c, value); }

template <typename Tile, typename T>
__device__ void load(Tile& tile, const T* pointer, int ld) {
  nvcuda::wmma::load_matrix_sync(tile, pointer, unsigned(ld));
}

template <typename A, typename B>
__device__ void multiply(WarpTileC& c, const A& a, const B& b) {
  nvcuda::wmma::mma_sync(c, a, b, c);
}

__device__ inline void store(float* pointer, const WarpTileC& c, int ld) {
  nvcuda::wmma::store_matrix_sync(pointer, c, unsigned(ld), nvcuda::wmma::mem_row_major);
}

}  // namespace pydl
#endif
