// Agreement of every box of one set with every box of another. A tile of the second set is turned once into vectors of
// coordinates, areas and angles; each box of the first set then meets it, a vector of pairs at a time, and every result
// is written once. Nothing of the size of the result is read.
#include "cpu/box_vec.h"

namespace pydl {
namespace {

constexpr int64_t kTileRows = 64, kTileCols = 512;

}  // namespace

namespace PYDL_ISA {
namespace {

template <class C>
struct BoxTile {
  C x1[kTileCols], y1[kTileCols], x2[kTileCols], y2[kTileCols], area[kTileCols], angle[kTileCols];
};

template <class C, int KIND, class T>
void fill_tile(const T* boxes, int64_t count, BoxTile<C>& tile) {
  for (int64_t j = 0; j < count; j += kLanes<C>) {
    const auto box = sized_box<VecMath<C>, KIND, false>(load_boxes(boxes + 4 * j, count - j));
    store(tile.x1 + j, box.x1);
    store(tile.y1 + j, box.y1);
    store(tile.x2 + j, box.x2);
    store(tile.y2 + j, box.y2);
    store(tile.area + j, box.area);
    if constexpr (KIND == kCompleteIou) store(tile.angle + j, box.angle);
  }
}

template <class C, int KIND>
void agree_with_tile(const SizedBox<VecMath<C>>& box, const BoxTile<C>& tile, int64_t count, C eps, C* out) {
  for (int64_t j = 0; j < count; j += kLanes<C>) {
    const SizedBox<VecMath<C>> other{load(tile.x1 + j), load(tile.y1 + j),   load(tile.x2 + j),
                                     load(tile.y2 + j), load(tile.area + j), load(tile.angle + j)};
    store_lanes(out + j, box_agreement<VecMath<C>, KIND, false>(box, other, eps), count - j);
  }
}

// Items are tiles: set of boxes, rows, columns, the last fastest.
template <class T, class C, int KIND>
void iou_tiles(const BoxPairs& p, void* out, int64_t begin, int64_t end) {
  const int64_t row_tiles = ceil_div(p.n, kTileRows), col_tiles = ceil_div(p.m, kTileCols);
  BoxTile<C> tile = {};
  for (int64_t item = begin; item < end; ++item) {
    const int64_t set = item / (row_tiles * col_tiles);
    const int64_t row = item / col_tiles % row_tiles * kTileRows, col = item % col_tiles * kTileCols;
    const int64_t rows = smaller(kTileRows, p.n - row), cols = smaller(kTileCols, p.m - col);
    const T* first = static_cast<const T*>(p.boxes1) + 4 * (set * p.n + row);
    fill_tile<C, KIND>(static_cast<const T*>(p.boxes2) + 4 * (set * p.m + col), cols, tile);
    C* results = static_cast<C*>(out) + (set * p.n + row) * p.m + col;
    for (int64_t i = 0; i < rows; ++i) {
      const auto box = sized_box<VecMath<C>, KIND, false>(splat_box(first + 4 * i));
      agree_with_tile<C, KIND>(box, tile, cols, C(p.eps), results + i * p.m);
    }
  }
}

}  // namespace

void box_iou_tiles(const BoxPairs& p, void* out, int64_t begin, int64_t end) {
  PYDL_FLOAT_SWITCH(p.dtype, PYDL_BOX_KIND_SWITCH(p.kind, iou_tiles<T, compute_t<T>, KIND>(p, out, begin, end)));
}

}  // namespace PYDL_ISA
}  // namespace pydl

#if PYDL_ISA_LEVEL == 0

namespace pydl {

PYDL_CPU_DECLARE(void, box_iou_tiles, const BoxPairs&, void*, int64_t, int64_t)

namespace {

Tensor box_iou_fwd(const Tensor& boxes1_in, const Tensor& boxes2_in, int64_t kind, double eps) {
  const Tensor boxes1 = host::as_contiguous(boxes1_in), boxes2 = host::as_contiguous(boxes2_in);
  const Array meta1(boxes1), meta2(boxes2);
  const BoxPairs p = box_pairs("box_iou_fwd", meta1, meta2, kind, eps);
  const Sizes sizes = pair_sizes(p, meta1.dim);
  Output out = host::empty(sizes.data(), meta1.dim, host::compute_dtype(p.dtype));
  if (p.batch * p.n * p.m == 0) return std::move(out.tensor);
  const int64_t tiles = p.batch * ((p.n + kTileRows - 1) / kTileRows) * ((p.m + kTileCols - 1) / kTileCols);
  const int64_t work = std::min(p.n, kTileRows) * std::min(p.m, kTileCols) * 2;
  host::parallel(tiles, work,
                 [&](int64_t begin, int64_t end) { PYDL_CPU_DISPATCH(box_iou_tiles)(p, out.data, begin, end); });
  return std::move(out.tensor);
}

STABLE_TORCH_LIBRARY_IMPL(pydl, CPU, m) { m.impl("box_iou_fwd", TORCH_BOX(&box_iou_fwd)); }

}  // namespace
}  // namespace pydl

#endif
