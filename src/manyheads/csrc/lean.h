// One block of rows against a few keys: where these lie, scores, online softmax, weighted values.
//
// Rows go in blocks of 8, 4, 2 and 1, so that 16 sums of products (rows x keys, then rows x
// columns) stand in registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vec.h"

namespace manyheads {

constexpr int64_t kKeys = 32;
#ifdef __AVX512F__
constexpr int kSums = 16, kRows = 8;  // of the 32 registers
#else
constexpr int kSums = 4, kRows = 4;  // a vector takes two or four registers
#endif
// Keeps a vector that several products take in a register: compilers load it again for each.
#ifdef __AVX512F__
#define KEEP(v) asm("" : "+v"(v))
#else
#define KEEP(v) (void)0
#endif
enum Dtype : int64_t { kFloat = 0, kBfloat = 1, kHalf = 2 };
enum Column { kRequest, kHead, kQuery, kQueries, kFirst, kEnd, kHost, kPlace, kColumns };

constexpr float kNothing = -__builtin_inff();

// Vectors that cover `count` numbers; the last one ends with the last number, so that it overlaps
// the one before instead of passing the end.
inline int64_t vectors(int64_t count) { return (count + kLanes - 1) / kLanes; }
inline int64_t column(int64_t vector, int64_t count) {
  return std::max<int64_t>(0, std::min(vector * kLanes, count - kLanes));
}

// A cache: element strides, and the bytes of a number.
struct Cache {
  const char *data;
  int64_t page_stride, head_stride, token_stride, dim, bytes;
};

struct Task {
  const float *query;  // (B, H, L, D)
  Cache key, value;
  const int64_t *pages, *lengths;  // (B, row_pages), (B)
  const int64_t *segments;         // (S, kColumns)
  float *m, *l, *o;                // rows of all segments, and vectors(V) * 16 columns of each
  float *out, *lse;                // (B, H, L, V), (B, H, L)
  int64_t heads, group, queries, row_pages, page, tile, dtype;
  bool is_causal;
  float scale;
};

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Ints){__VA_ARGS__})
#endif

// Each adds neighbouring stretches of 8, 4, 2, 1 lanes: those of `a` go where the lane's bit of
// that value is 0, those of `b` where it is 1.
inline Floats fold8(Floats a, Floats b) {
  return SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}
inline Floats fold4(Floats a, Floats b) {
  return SHUFFLE(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
         SHUFFLE(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
}
inline Floats fold2(Floats a, Floats b) {
  return SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
         SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}
inline Floats fold1(Floats a, Floats b) {
  return SHUFFLE(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         SHUFFLE(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

// Lane i is the sum of the lanes of v[i].
inline Floats sums(const Floats *v) {
  Floats t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) t[i] = fold8(v[i], v[i + 8]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) t[i] = fold4(t[i], t[i + 4]);
  t[0] = fold2(t[0], t[2]);
  t[1] = fold2(t[1], t[3]);
  return fold1(t[0], t[1]);
}

inline void prefetch(const char *from) { __builtin_prefetch(from, 0, 2); }

// Addresses of the keys or values of a few tokens; places behind the last one repeat it.
struct Addresses {
  const char *of[kKeys];
  int64_t count = 0;

  void find(const Task &t, const Cache &c, int64_t request, int64_t head, int64_t first,
            int64_t number) {
    count = number;
    const int64_t *row = t.pages + request * t.row_pages;
    int64_t page = first / t.page, inside = first % t.page;
    for (int64_t i = 0; i < number;) {
      const char *at = c.data + (row[page] * c.page_stride + head * c.head_stride +
                                 inside * c.token_stride) * c.bytes;
      const int64_t run = std::min(number - i, t.page - inside);
      for (int64_t j = 0; j < run; ++j) of[i++] = at + j * c.token_stride * c.bytes;
      inside = 0;
      ++page;
    }
    for (int64_t i = number; i < kKeys && number; ++i) of[i] = of[number - 1];
  }
};

inline Floats widen(const char *from, int64_t dtype) {
  typedef uint16_t Shorts __attribute__((vector_size(kLanes * 2)));
  Shorts raw;
  std::memcpy(&raw, from, sizeof raw);
  const Ints bits = __builtin_convertvector(raw, Ints);
  if (dtype == kBfloat) return (Floats)(bits << 16);
  const Ints size = bits & 0x7fff, sign = (bits & 0x8000) << 16;
  // As float32 the exponent is 112 too small; the product also mends subnormal numbers.
  const Ints usual = (Ints)((Floats)(size << 13) * 0x1p112f);
  return (Floats)((size >= 0x7c00 ? ((size << 13) | 0x7f800000) : usual) | sign);
}

// Copies rows as float32 and lets the addresses point to the copies; `to` has vectors(dim) * 16
// columns, of which those behind the last are 0 where a row is shorter than a vector.
void widen_rows(Addresses &rows, const Cache &c, int64_t dtype, float *to) {
  const int64_t width = vectors(c.dim) * kLanes;
  for (int64_t i = 0; i < rows.count; ++i) {
    float *row = to + i * width;
    if (c.dim < kLanes) {
      char some[kLanes * 4] = {};
      std::memcpy(some, rows.of[i], c.dim * c.bytes);
      store(row, dtype == kFloat ? load((const float *)some) : widen(some, dtype));
    } else {
      for (int64_t v = 0; v < vectors(c.dim); ++v) {
        const int64_t at = column(v, c.dim);
        store(row + at, widen(rows.of[i] + at * c.bytes, dtype));
      }
    }
    rows.of[i] = (const char *)row;
  }
  for (int64_t i = rows.count; i < kKeys; ++i) rows.of[i] = rows.of[rows.count - 1];
}

// Keys now, what is fetched meanwhile, and the bytes of a vector of it.
struct Rows {
  const Addresses &now, &next;
  int64_t dim, step;
};

// R rows against K = 16 / R keys at a time. Lane i of a vector of scores is key i / R, row i % R.
template <int R>
inline void score(const float *query, const Rows &keys, bool fetch, Floats *scores) {
  constexpr int K = kLanes / R, kPart = kSums / R < K ? kSums / R : K;
  const int64_t many = vectors(keys.dim), width = many * kLanes;
  for (int64_t j = 0; j < keys.now.count; j += K) {
    Floats all[kLanes];
    for (int part = 0; part < K; part += kPart) {
      Floats sum[kPart * R] = {};
      const char *const *from = keys.now.of + j + part;
      for (int64_t v = 0; v < many; ++v) {
        const int64_t at = column(v, keys.dim);
        Floats key[kPart];
        if (fetch)
#pragma GCC unroll 16
          for (int i = 0; i < kPart; ++i) prefetch(keys.next.of[j + part + i] + v * keys.step);
#pragma GCC unroll 16
        for (int i = 0; i < kPart; ++i) {
          Floats k = load((const float *)from[i] + at);
          KEEP(k);
          key[i] = k;
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          Floats q = load(query + r * width + v * kLanes);
          KEEP(q);
#pragma GCC unroll 16
          for (int i = 0; i < kPart; ++i) sum[i * R + r] += q * key[i];
        }
      }
#pragma GCC unroll 16
      for (int i = 0; i < kPart * R; ++i) all[part * R + i] = sum[i];
    }
    scores[j / K] = sums(all);
  }
}

// o = o * decay + weights x values, for R rows and C vectors of columns from vector `v` on.
template <int R, int C>
inline void gather(const float *weights, const float *decay, const Rows &values, int64_t v,
                   bool fetch, float *o) {
  const int64_t width = vectors(values.dim) * kLanes;
  int64_t at[C];
  Floats sum[R * C];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) {
    at[c] = column(v + c, values.dim);
    for (int r = 0; r < R; ++r)
      sum[r * C + c] = load(o + r * width + (v + c) * kLanes) * decay[r];
  }
  for (int64_t j = 0; j < values.now.count; ++j) {
    const float *row = (const float *)values.now.of[j];
    Floats value[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      Floats x = load(row + at[c]);
      KEEP(x);
      value[c] = x;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Floats weight = splat(weights[j * R + r]);
      KEEP(weight);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[r * C + c] += weight * value[c];
    }
    if (fetch)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) prefetch(values.next.of[j] + (v + c) * values.step);
  }
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r) store(o + r * width + (v + c) * kLanes, sum[r * C + c]);
}

template <int R, int C>
inline void gather_from(const float *weights, const float *decay, const Rows &values, int64_t v,
                        bool fetch, float *o) {
  if constexpr (R * C <= kSums) {
    for (; v + C <= vectors(values.dim); v += C)
      gather<R, C>(weights, decay, values, v, fetch, o);
  }
  if constexpr (C > 1) gather_from<R, C / 2>(weights, decay, values, v, fetch, o);
}

// Weights e^(s - m) of one block of rows, and the factors of what they have gathered so far.
// `limits`, if any: how many of the keys at hand a row may see.
template <int R>
void weigh(const float *query, const Rows &keys, const int64_t *limits, bool fetch, float *m,
           float *l, float *weights, float *factor) {
  constexpr int K = kLanes / R;
  Floats scores[kKeys / K];
  score<R>(query, keys, fetch, scores);
  const int64_t count = keys.now.count, many = (count + K - 1) / K;
  if (limits || count % K) {
    for (int64_t v = 0; v < many; ++v)
      for (int i = 0; i < kLanes; ++i) {
        const int64_t key = v * K + i / R;
        if (key >= count || (limits && key >= limits[i % R])) scores[v][i] = kNothing;
      }
  }
  Floats top = splat(kNothing);
  for (int64_t v = 0; v < many; ++v) top = larger(top, scores[v]);
  Floats base = {}, decay = {};
  for (int r = 0; r < R; ++r) {
    float best = m[r];
    for (int i = r; i < kLanes; i += R) best = std::max(best, top[i]);
    const float finite = best == kNothing ? 0 : best;
    decay[r] = m[r] - finite;
    for (int i = r; i < kLanes; i += R) base[i] = finite;
    m[r] = best;
  }
  decay = exp(decay);
  Floats total = {};
  for (int64_t v = 0; v < many; ++v) {
    const Floats weight = exp(scores[v] - base);
    store(weights + v * kLanes, weight);
    total += weight;
  }
  for (int r = 0; r < R; ++r) factor[r] = decay[r];
  for (int r = 0; r < R; ++r) {
    float sum = 0;
    for (int i = r; i < kLanes; i += R) sum += total[i];
    l[r] = l[r] * factor[r] + sum;
  }
}

}  // namespace manyheads
