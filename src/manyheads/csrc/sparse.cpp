// Block-sparse softmax attention, forward and backward: each block of queries meets the key blocks
// of its row of a list. Queries are scaled by the caller. Nothing is shared between threads: outputs
// and dq belong to a block of queries, dk and dv to a block of keys, so results do not depend on
// how many threads there are.
//
// query (B, H, N, D), key (B, Hk, M, D), value (B, Hk, M, V), out (B, H, N, V), lse (B, H, N).
// offsets (Bl Hl P + 1) and columns (visits): the key blocks of each of the P query blocks, Bl and
// Hl being 1 where all samples or heads share a list; a column without keys is passed over.
// bits (masks, block_q, block_k) and which (visits): the bits of a visit, or -1 for a whole block;
// both may be null. lengths (B): real keys, or null.
#include <cfloat>
#include <cmath>

#include "tile.h"

using namespace manyheads;

namespace {

struct Sizes {
  int64_t batch, heads, kv_heads, queries, keys, dim, value_dim, block_q, block_k;
  int64_t list_batch, list_heads;
  const int64_t *lengths;

  int64_t rows() const { return (queries + block_q - 1) / block_q; }
  int64_t blocks() const { return (keys + block_k - 1) / block_k; }
  int64_t list(int64_t b, int64_t h) const {
    return (list_batch > 1 ? b : 0) * list_heads + (list_heads > 1 ? h : 0);
  }
  int64_t group() const { return heads / kv_heads; }
  int64_t queries_in(int64_t row) const { return least(block_q, queries - row * block_q); }
  int64_t keys_in(int64_t b, int64_t block) const {
    if (block < 0 || block >= blocks()) return 0;
    const int64_t real = lengths ? least(lengths[b], keys) : keys;
    return least(block_k, real - block * block_k);
  }
  static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
};

struct Masks {
  const int64_t *which;
  const uint8_t *bits;

  const uint8_t *of(int64_t visit, const Sizes &s) const {
    const int64_t index = which ? which[visit] : -1;
    return index < 0 ? nullptr : bits + index * s.block_q * s.block_k;
  }
};

// Scores at [q * q_step + k * k_step] that bits (queries, keys; `stride`) leave out become -inf.
void apply(const uint8_t *bits, int64_t stride, float *scores, int64_t queries, int64_t keys,
           int64_t q_step, int64_t k_step) {
  for (int64_t q = 0; q < queries; ++q)
    for (int64_t k = 0; k < keys; ++k)
      if (!bits[q * stride + k]) scores[q * q_step + k * k_step] = -INFINITY;
}

// Numbers of scratch for each thread; the caller's allocation follows the same sum.
int64_t scratch_of(const Sizes &s) {
  const int64_t q = padded(Sizes::least(s.block_q, s.queries));
  const int64_t k = padded(Sizes::least(s.block_k, s.keys));
  const int64_t d = padded(s.dim), v = padded(s.value_dim), longer = q > k ? q : k;
  return 2 * q * k + 3 * longer * (d + v) + 8 * longer;
}

void forward_row(const Sizes &s, const Masks &masks, const float *query, const float *key,
                 const float *value, const int64_t *offsets, const int64_t *columns, float *out,
                 float *lse, float *scratch, int64_t index) {
  const int64_t rows = s.rows(), row = index % rows, head = index / rows;
  const int64_t b = head / s.heads, h = head % s.heads, kv = b * s.kv_heads + h / s.group();
  const int64_t *visits = offsets + s.list(b, h) * rows + row;
  const int64_t count = s.queries_in(row), lanes = padded(count), width = padded(s.value_dim);
  const int64_t first = head * s.queries + row * s.block_q;
  const int64_t deep = padded(Sizes::least(s.block_k, s.keys));
  float *turned = scratch, *scores = turned + lanes * s.dim;
  float *packed = scores + lanes * deep, *sums = packed + deep * width;
  float *top = sums + lanes * width, *total = top + lanes, *keep = total + lanes;
  pack_transposed(query + first * s.dim, count, s.dim, s.dim, turned);
  for (int64_t i = 0; i < lanes * width; ++i) sums[i] = 0;
  for (int64_t i = 0; i < lanes; ++i) top[i] = -FLT_MAX, total[i] = 0;
  for (int64_t visit = visits[0]; visit < visits[1]; ++visit) {
    const int64_t block = columns[visit], present = s.keys_in(b, block);
    if (present <= 0) continue;
    const int64_t at = kv * s.keys + block * s.block_k;
    product<false>(present, count, s.dim, key + at * s.dim, s.dim, 1, turned, scores, lanes);
    if (const uint8_t *bits = masks.of(visit, s))
      apply(bits, s.block_k, scores, count, present, 1, lanes);
    if (absorb(scores, present, lanes, top, total, keep)) rescale(sums, count, width, keep);
    pack(value + at * s.value_dim, present, s.value_dim, s.value_dim, packed);
    product<true>(count, s.value_dim, present, scores, 1, lanes, packed, sums, width);
  }
  for (int64_t q = 0; q < count; ++q) {
    const float whole = total[q] == 0 ? 1.0f : total[q], share = 1.0f / whole;
    lse[first + q] = top[q] + std::log(whole);
    float *to = out + (first + q) * s.value_dim;
    for (int64_t v = 0; v < s.value_dim; ++v) to[v] = sums[q * width + v] * share;
  }
}

// Of one vector of scores and one of dp: weights exp(s - lse) and slopes p (dp - delta), in place.
inline void slopes(float *scores, float *rising, Floats lse, Floats delta) {
  const Floats weight = exp(load(scores) - lse);
  store(scores, weight);
  store(rising, weight * (load(rising) - delta));
}

void query_row(const Sizes &s, const Masks &masks, const float *grad, const float *query,
               const float *key, const float *value, const float *lse, const float *delta,
               const int64_t *offsets, const int64_t *columns, float *dq, float *scratch,
               int64_t index) {
  const int64_t rows = s.rows(), row = index % rows, head = index / rows;
  const int64_t b = head / s.heads, h = head % s.heads, kv = b * s.kv_heads + h / s.group();
  const int64_t *visits = offsets + s.list(b, h) * rows + row;
  const int64_t count = s.queries_in(row), lanes = padded(count), width = padded(s.dim);
  const int64_t first = head * s.queries + row * s.block_q;
  const int64_t deep = padded(Sizes::least(s.block_k, s.keys));
  float *turned = scratch, *turned_grad = turned + lanes * s.dim;
  float *scores = turned_grad + lanes * s.value_dim, *rising = scores + lanes * deep;
  float *packed = rising + lanes * deep, *sums = packed + deep * width;
  float *own_lse = sums + lanes * width, *own_delta = own_lse + lanes;
  pack_transposed(query + first * s.dim, count, s.dim, s.dim, turned);
  pack_transposed(grad + first * s.value_dim, count, s.value_dim, s.value_dim, turned_grad);
  for (int64_t i = 0; i < lanes * width; ++i) sums[i] = 0;
  for (int64_t i = 0; i < lanes; ++i) {
    own_lse[i] = i < count ? lse[first + i] : 0;
    own_delta[i] = i < count ? delta[first + i] : 0;
  }
  for (int64_t visit = visits[0]; visit < visits[1]; ++visit) {
    const int64_t block = columns[visit], present = s.keys_in(b, block);
    if (present <= 0) continue;
    const int64_t at = kv * s.keys + block * s.block_k;
    product<false>(present, count, s.dim, key + at * s.dim, s.dim, 1, turned, scores, lanes);
    product<false>(present, count, s.value_dim, value + at * s.value_dim, s.value_dim, 1,
                   turned_grad, rising, lanes);
    if (const uint8_t *bits = masks.of(visit, s))
      apply(bits, s.block_k, scores, count, present, 1, lanes);
    for (int64_t k = 0; k < present; ++k)
      for (int64_t q = 0; q < lanes; q += kLanes)
        slopes(scores + k * lanes + q, rising + k * lanes + q, load(own_lse + q),
               load(own_delta + q));
    pack(key + at * s.dim, present, s.dim, s.dim, packed);
    product<true>(count, s.dim, present, rising, 1, lanes, packed, sums, width);
  }
  for (int64_t q = 0; q < count; ++q)
    std::memcpy(dq + (first + q) * s.dim, sums + q * width, sizeof(float) * s.dim);
}

void key_block(const Sizes &s, const Masks &masks, const float *grad, const float *query,
               const float *key, const float *value, const float *lse, const float *delta,
               const int64_t *starts, const int64_t *visits, const int64_t *sources, float *dk,
               float *dv, float *scratch, int64_t index) {
  const int64_t blocks = s.blocks(), block = index % blocks, kv = index / blocks;
  const int64_t b = kv / s.kv_heads, first_head = kv % s.kv_heads * s.group();
  const int64_t whole = Sizes::least(s.block_k, s.keys - block * s.block_k);
  const int64_t at = kv * s.keys + block * s.block_k;
  for (int64_t i = 0; i < whole * s.dim; ++i) dk[at * s.dim + i] = 0;
  for (int64_t i = 0; i < whole * s.value_dim; ++i) dv[at * s.value_dim + i] = 0;
  const int64_t present = s.keys_in(b, block), lanes = padded(present);
  if (present <= 0) return;
  const int64_t width = padded(s.dim), value_width = padded(s.value_dim);
  const int64_t deep = padded(Sizes::least(s.block_q, s.queries));
  float *turned = scratch, *turned_value = turned + lanes * s.dim;
  float *scores = turned_value + lanes * s.value_dim, *rising = scores + lanes * deep;
  float *packed = rising + lanes * deep, *packed_grad = packed + deep * width;
  float *key_sums = packed_grad + deep * value_width, *value_sums = key_sums + lanes * width;
  pack_transposed(key + at * s.dim, present, s.dim, s.dim, turned);
  pack_transposed(value + at * s.value_dim, present, s.value_dim, s.value_dim, turned_value);
  for (int64_t i = 0; i < lanes * (width + value_width); ++i) key_sums[i] = 0;
  for (int64_t h = first_head; h < first_head + s.group(); ++h) {
    const int64_t *range = starts + s.list(b, h) * blocks + block;
    for (int64_t i = range[0]; i < range[1]; ++i) {
      const int64_t row = sources[i], count = s.queries_in(row);
      const int64_t first = (b * s.heads + h) * s.queries + row * s.block_q;
      const float *q = query + first * s.dim, *g = grad + first * s.value_dim;
      product<false>(count, present, s.dim, q, s.dim, 1, turned, scores, lanes);
      product<false>(count, present, s.value_dim, g, s.value_dim, 1, turned_value, rising, lanes);
      if (const uint8_t *bits = masks.of(visits[i], s))
        apply(bits, s.block_k, scores, count, present, lanes, 1);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t k = 0; k < lanes; k += kLanes)
          slopes(scores + r * lanes + k, rising + r * lanes + k, splat(lse[first + r]),
                 splat(delta[first + r]));
      pack(q, count, s.dim, s.dim, packed);
      pack(g, count, s.value_dim, s.value_dim, packed_grad);
      product<true>(present, s.dim, count, rising, 1, lanes, packed, key_sums, width);
      product<true>(present, s.value_dim, count, scores, 1, lanes, packed_grad, value_sums,
                    value_width);
    }
  }
  for (int64_t k = 0; k < present; ++k) {
    std::memcpy(dk + (at + k) * s.dim, key_sums + k * width, sizeof(float) * s.dim);
    std::memcpy(dv + (at + k) * s.value_dim, value_sums + k * value_width,
                sizeof(float) * s.value_dim);
  }
}

}  // namespace

extern "C" {

// scratch: threads times what scratch_of says.
void sparse_forward(const float *query, const float *key, const float *value,
                    const int64_t *offsets, const int64_t *columns, const int64_t *which,
                    const uint8_t *bits, const int64_t *lengths, float *out, float *lse,
                    float *scratch, int64_t batch, int64_t heads, int64_t kv_heads,
                    int64_t queries, int64_t keys, int64_t dim, int64_t value_dim,
                    int64_t block_q, int64_t block_k, int64_t list_batch, int64_t list_heads,
                    int64_t threads) {
  const Sizes s{batch,   heads,   kv_heads,   queries,    keys,   dim, value_dim,
                block_q, block_k, list_batch, list_heads, lengths};
  const Masks masks{which, bits};
  const int64_t items = batch * heads * s.rows(), size = scratch_of(s);
#pragma omp parallel num_threads(threads)
  {
    float *own = nullptr;
#pragma omp critical(sparse_scratch)
    own = scratch, scratch += size;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < items; ++i)
      forward_row(s, masks, query, key, value, offsets, columns, out, lse, own, i);
  }
}

// delta (B, H, N): rows of out * grad summed. starts (Bl Hl Q + 1), visits and sources: which visits
// each of the Q key blocks gets, in the order of the list, and from which query block.
void sparse_backward(const float *grad, const float *query, const float *key, const float *value,
                     const float *lse, const float *delta, const int64_t *offsets,
                     const int64_t *columns, const int64_t *which, const uint8_t *bits,
                     const int64_t *lengths, const int64_t *starts, const int64_t *visits,
                     const int64_t *sources, float *dq, float *dk, float *dv, float *scratch,
                     int64_t batch, int64_t heads, int64_t kv_heads, int64_t queries,
                     int64_t keys, int64_t dim, int64_t value_dim, int64_t block_q,
                     int64_t block_k, int64_t list_batch, int64_t list_heads, int64_t threads) {
  const Sizes s{batch,   heads,   kv_heads,   queries,    keys,   dim, value_dim,
                block_q, block_k, list_batch, list_heads, lengths};
  const Masks masks{which, bits};
  const int64_t items = batch * heads * s.rows(), size = scratch_of(s);
  const int64_t blocks = batch * kv_heads * s.blocks();
#pragma omp parallel num_threads(threads)
  {
    float *own = nullptr;
#pragma omp critical(sparse_scratch)
    own = scratch, scratch += size;
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < items; ++i)
      query_row(s, masks, grad, query, key, value, lse, delta, offsets, columns, dq, own, i);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < blocks; ++i)
      key_block(s, masks, grad, query, key, value, lse, delta, starts, visits, sources, dk, dv,
                own, i);
  }
}
}
