// Host version of common/warp_matrix.h: lane l holds elements 8 * l ... 8 * l + 7 of a tile in row-major order.
#pragma once

#include <cstdint>
#include <string>

#include "pydl_simt/half.h"
#include "pydl_simt/warp.h"

namespace pydl {
namespace simt {

template <typename T>
struct Tile {
  static constexpr int num_elements = 8;
  T x[num_elements];
};

inline void check_tile(const void* pointer, int ld, int ld_multiple) {
  if (reinterpret_cast<uintptr_t>(pointer) % 32 != 0) fail("warp tile: the pointer is not 32-byte aligned");
  if (ld % ld_multiple != 0) {
    fail("warp tile: ld is " + std::to_string(ld) + ", no multiple of " + std::to_string(ld_multiple));
  }
}

template <typename T, typename U>
void load_tile(Tile<T>& tile, const U* pointer, int ld, bool columns) {
  for (int i = 0; i < 8; ++i) {
    int row = lane_id() / 2;
    int column = lane_id() % 2 * 8 + i;
    tile.x[i] = columns ? pointer[column * ld + row] : pointer[row * ld + column];
  }
}

template <typename T>
struct Product {
  Tile<float>* c;
  const Tile<T>* a;
  const Tile<T>* b;
};

template <typename T>
void resolve_product(void** lanes, unsigned) {
  auto at = [&](int row, int column) { return static_cast<Product<T>*>(lanes[row * 2 + column / 8]); };
  float b[16][16];
  for (int k = 0; k < 16; ++k) {
    for (int column = 0; column < 16; ++column) b[k][column] = float(at(k, column)->b->x[column % 8]);
  }
  for (int row = 0; row < 16; ++row) {
    float sums[16] = {};
    for (int k = 0; k < 16; ++k) {
      float a = float(at(row, k)->a->x[k % 8]);
      for (int column = 0; column < 16; ++column) sums[column] += a * b[k][column];
    }
    for (int column = 0; column < 16; ++column) at(row, column)->c->x[column % 8] += sums[column];
  }
}

}  // namespace simt

template <typename T>
struct WarpTileA : simt::Tile<T> {};
template <typename T, bool Columns = false>
struct WarpTileB : simt::Tile<T> {};
struct WarpTileC : simt::Tile<float> {};

inline void fill(WarpTileC& c, float value) {
  for (float& x : c.x) x = value;
}

template <typename T>
void load(WarpTileA<T>& tile, const T* pointer, int ld, simt::Site site = simt::Site::here()) {
  simt::check_tile(pointer, ld, 8);
  __syncwarp(0xffffffffu, site);
  simt::load_tile(tile, pointer, ld, false);
}

template <typename T, bool Columns>
void load(WarpTileB<T, Columns>& tile, const T* pointer, int ld, simt::Site site = simt::Site::here()) {
  simt::check_tile(pointer, ld, 8);
  __syncwarp(0xffffffffu, site);
  simt::load_tile(tile, pointer, ld, Columns);
}

template <typename T, bool Columns>
void multiply(WarpTileC& c, const WarpTileA<T>& a, const WarpTileB<T, Columns>& b,
              simt::Site site = simt::Site::here()) {
  simt::Product<T> local{&c, &a, &b};
  if (__activemask() != 0xffffffffu) simt::fail("warp tile: all 32 lanes must take part");
  simt::warp_collective(0xffffffffu, site, &local, &simt::resolve_product<T>);
}

inline void store(float* pointer, const WarpTileC& c, int ld, simt::Site site = simt::Site::here()) {
  simt::check_tile(pointer, ld, 4);
  __syncwarp(0xffffffffu, site);
  for (int i = 0; i < 8; ++i) pointer[simt::lane_id() / 2 * ld + simt::lane_id() % 2 * 8 + i] = c.x[i];
}

}  // namespace pydl
