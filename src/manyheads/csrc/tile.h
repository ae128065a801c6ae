// Products of small matrices with a tile of the result in registers, and the softmax of scores that
// arrive block by block. Right-hand sides are packed in panels: [columns / 16][depth][16].
#pragma once

#include "vec.h"

namespace manyheads {

#if defined(__AVX512F__)
constexpr int kTileRows = 8, kTilePanels = 2;  // 16 of 32 registers hold sums
#else
constexpr int kTileRows = 6, kTilePanels = 1;  // 12 of 16 with AVX2, 24 of 32 with NEON
#endif

static inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// (rows, columns), row-major with `stride`, to panels; missing lanes of the last are 0.
static inline void pack(const float *from, int64_t rows, int64_t columns, int64_t stride,
                        float *to) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int count = columns - c < kLanes ? int(columns - c) : kLanes;
    for (int64_t r = 0; r < rows; ++r, to += kLanes) {
      const float *row = from + r * stride + c;
      store(to, count == kLanes ? load(row) : load(row, count));
    }
  }
}

// The transpose of (rows, columns) to panels: [rows / 16][columns][16].
static inline void pack_transposed(const float *from, int64_t rows, int64_t columns,
                                   int64_t stride, float *to) {
  for (int64_t r = 0; r < rows; r += kLanes, to += columns * kLanes) {
    const int count = rows - r < kLanes ? int(rows - r) : kLanes;
    for (int lane = 0; lane < kLanes; ++lane) {
      const float *row = from + (r + lane) * stride;
      for (int64_t c = 0; c < columns; ++c) to[c * kLanes + lane] = lane < count ? row[c] : 0;
    }
  }
}

// c[R, P panels] (+)= a b, a read at a[r * row + k * step]: either side of a product may be
// transposed by choosing the strides.
template <int R, int P, bool kAdd>
static inline void tile(const float *a, int64_t row, int64_t step, const float *b, int64_t depth,
                        float *c, int64_t stride) {
  Floats sums[R][P];
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p)
      sums[r][p] = kAdd ? load(c + r * stride + p * kLanes) : Floats{};
  for (int64_t k = 0; k < depth; ++k) {
    Floats right[P];
    for (int p = 0; p < P; ++p) right[p] = load(b + (p * depth + k) * kLanes);
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < P; ++p) sums[r][p] += a[r * row + k * step] * right[p];
  }
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) store(c + r * stride + p * kLanes, sums[r][p]);
}

template <int R, int P, bool kAdd>
static inline void tile_rows(int64_t rows, const float *a, int64_t row, int64_t step,
                             const float *b, int64_t depth, float *c, int64_t stride) {
  if constexpr (R > 0) {
    if (rows == R) return tile<R, P, kAdd>(a, row, step, b, depth, c, stride);
    tile_rows<R - 1, P, kAdd>(rows, a, row, step, b, depth, c, stride);
  }
}

template <int P, bool kAdd>
static inline void strip(int64_t rows, const float *a, int64_t row, int64_t step, const float *b,
                         int64_t depth, float *c, int64_t stride) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows)
    tile<kTileRows, P, kAdd>(a + r * row, row, step, b, depth, c + r * stride, stride);
  tile_rows<kTileRows - 1, P, kAdd>(rows - r, a + r * row, row, step, b, depth, c + r * stride,
                                    stride);
}

// c (rows, columns padded to 16) = a b, or += with kAdd; c has a `stride` of whole panels.
template <bool kAdd>
static inline void product(int64_t rows, int64_t columns, int64_t depth, const float *a,
                           int64_t row, int64_t step, const float *b, float *c, int64_t stride) {
  int64_t p = 0;
  for (; p + (kTilePanels - 1) * kLanes < columns; p += kTilePanels * kLanes)
    strip<kTilePanels, kAdd>(rows, a, row, step, b + p * depth, depth, c + p, stride);
  for (; p < columns; p += kLanes)
    strip<1, kAdd>(rows, a, row, step, b + p * depth, depth, c + p, stride);
}

// Softmax over blocks of scores as they come: `top` and `total` of each query, a lane each.
// Scores (keys, queries) become weights relative to the new top; `keep` is what earlier sums are to
// be multiplied by. Returns whether any is not 1. A query without a key has total 0.
static inline bool absorb(float *scores, int64_t keys, int64_t queries, float *top, float *total,
                          float *keep) {
  bool changed = false;
  for (int64_t q = 0; q < queries; q += kLanes) {
    const Floats before = load(top + q);
    Floats most = before;
    for (int64_t k = 0; k < keys; ++k) most = larger(load(scores + k * queries + q), most);
    Floats sums = {};
    for (int64_t k = 0; k < keys; ++k) {
      const Floats weight = exp(load(scores + k * queries + q) - most);
      sums += weight;
      store(scores + k * queries + q, weight);
    }
    const Floats factor = exp(before - most);
    store(keep + q, factor);
    store(top + q, most);
    store(total + q, load(total + q) * factor + sums);
    for (int i = 0; i < kLanes; ++i) changed |= factor[i] != 1.0f;
  }
  return changed;
}

// rows (count, columns) times a factor each.
static inline void rescale(float *rows, int64_t count, int64_t columns, const float *factors) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = 0; c < columns; c += kLanes)
      store(rows + r * columns + c, load(rows + r * columns + c) * factors[r]);
}

}  // namespace manyheads
