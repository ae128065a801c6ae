// Products of 8-bit numbers with 32-bit sums, and 8-bit codes, 16 outputs at a time.
#pragma once

#include "gates.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
// GCC takes what its own header leaves undefined on purpose for a mistake.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#define MANYHEADS_VNNI 1
#endif

namespace manyheads {

typedef int8_t Bytes __attribute__((vector_size(kLanes)));
static inline Bytes load_bytes(const int8_t *from, int count) {
  Bytes v = {};
  if (count == kLanes) {
    std::memcpy(&v, from, kLanes);
  } else {
    std::memcpy(&v, from, count);
  }
  return v;
}

// GCC converts bytes one by one unless it is told the instruction or shown a loop.
static inline Ints widen(Bytes v) {
#ifdef MANYHEADS_VNNI
  return (Ints)_mm512_cvtepi8_epi32((__m128i)v);
#else
  int8_t from[kLanes];
  int32_t to[kLanes];
  std::memcpy(from, &v, sizeof from);
  for (int i = 0; i < kLanes; ++i) to[i] = from[i];
  Ints wide;
  std::memcpy(&wide, to, sizeof wide);
  return wide;
#endif
}
static inline Floats real(Ints v) { return __builtin_convertvector(v, Floats); }

static inline Floats load_real(const int8_t *from, int count) {
  return real(widen(load_bytes(from, count)));
}

// The nearest code, halves away from zero; NaN becomes -128. Reading the magnitude by its bits
// keeps the compiler from fusing the product that x may be with the difference below: codes are
// those of separately rounded operations, as PyTorch has them.
static inline Bytes encode(Floats x) {
  Floats size = magnitude(x);
  size = size < 200.0f ? size : splat(200.0f);
  Ints whole = __builtin_convertvector(size, Ints);
  whole -= (Ints)(size - real(whole) >= 0.5f);  // a true comparison is -1
  Ints code = x < 0.0f ? -whole : whole;
  code = code > 127 ? Ints{} + 127 : code;
  code = code < -128 ? Ints{} - 128 : code;
  return __builtin_convertvector(code, Bytes);
}

static inline void store_bytes(int8_t *to, Bytes v, int count) {
  if (count == kLanes) {
    std::memcpy(to, &v, kLanes);
  } else {
    std::memcpy(to, &v, count);
  }
}

static inline int width(int64_t c, int64_t last) {
  return (int)(last - c < kLanes ? last - c : kLanes);
}

// The codes of `count` numbers.
static inline void encode_row(const float *y, int8_t *codes, int64_t count, float scale) {
  for (int64_t c = 0; c < count; c += kLanes) {
    const int some = width(c, count);
    store_bytes(codes + c, encode(load_some(y + c, some) / scale), some);
  }
}

// The values of `count` codes.
static inline void decode_row(const int8_t *from, float scale, float *to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int some = width(i, count);
    store_some(to + i, load_real(from + i, some) * scale, some);
  }
}

// Sylvester's transform of each of the rows of (base, fast), then the base matrix on the rows.
static inline void rotate(float *y, float *other, const float *matrix, int64_t base, int64_t fast) {
  const int64_t n = base * fast;
  int64_t step = 1;
  for (; step < kLanes && step < fast; step *= 2)
    for (int64_t i = 0; i < n; i += 2 * step)
      for (int64_t j = i; j < i + step; ++j) {
        const float a = y[j], b = y[j + step];
        y[j] = a + b;
        y[j + step] = a - b;
      }
  for (; step < fast; step *= 2)
    for (int64_t i = 0; i < n; i += 2 * step)
      for (int64_t j = i; j < i + step; j += kLanes) {
        const Floats a = load(y + j), b = load(y + j + step);
        store(y + j, a + b);
        store(y + j + step, a - b);
      }
  if (base == 1) return;
  for (int64_t c = 0; c < fast; c += kLanes) {
    const int count = width(c, fast);
    for (int64_t k = 0; k < base; ++k) {
      Floats sum = {};
      for (int64_t i = 0; i < base; ++i)
        sum += matrix[k * base + i] * load_some(y + i * fast + c, count);
      store_some(other + k * fast + c, sum, count);
    }
  }
  std::memcpy(y, other, n * sizeof(float));
}

// sums[m][o] = row m of x times row o of w, for 1 or 4 rows of x and 16 of w.
#ifdef MANYHEADS_VNNI

// The instruction multiplies unsigned by signed: w + 128 stands for w, and 128 sum(x) is taken off.
static inline __m512i some(const int8_t *from, __mmask64 which) {
  return _mm512_maskz_loadu_epi8(which, from);
}

static inline __mmask64 first(int64_t count) {
  return count >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << count) - 1;
}

// The sums of 16 vectors, one a lane.
static inline __m512i fold(const __m512i *v) {
  __m512i pairs[8], quads[4];
  for (int i = 0; i < 8; ++i)
    pairs[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]),
                                _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]));
  for (int i = 0; i < 4; ++i)
    quads[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(pairs[2 * i], pairs[2 * i + 1]),
                                _mm512_unpackhi_epi64(pairs[2 * i], pairs[2 * i + 1]));
  const __m512i a = _mm512_add_epi32(_mm512_shuffle_i32x4(quads[0], quads[1], 0x44),
                                     _mm512_shuffle_i32x4(quads[0], quads[1], 0xee));
  const __m512i b = _mm512_add_epi32(_mm512_shuffle_i32x4(quads[2], quads[3], 0x44),
                                     _mm512_shuffle_i32x4(quads[2], quads[3], 0xee));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

static inline int32_t total(const int8_t *x, int64_t count) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t k = 0; k < count; k += 64)
    sum = _mm512_dpbusd_epi32(sum, ones, some(x + k, first(count - k)));
  return _mm512_reduce_add_epi32(sum);
}

template <int kRows>
static inline void products(const int8_t *x, int64_t row, const int8_t *const *w, int64_t count,
                            const int32_t *totals, Ints *sums) {
  constexpr int kOuts = 16 / kRows;  // accumulators fill half of the registers
  const __m512i flip = _mm512_set1_epi8((char)0x80);
  for (int at = 0; at < 16; at += kOuts) {
    __m512i acc[16];
    for (auto &a : acc) a = _mm512_setzero_si512();
    auto add = [&](int64_t k, __mmask64 which) __attribute__((always_inline)) {
      __m512i in[kRows];
      for (int m = 0; m < kRows; ++m) in[m] = some(x + m * row + k, which);
      for (int o = 0; o < kOuts; ++o) {
        const __m512i weight = _mm512_xor_si512(some(w[at + o] + k, which), flip);
        for (int m = 0; m < kRows; ++m)
          acc[m * kOuts + o] = _mm512_dpbusd_epi32(acc[m * kOuts + o], weight, in[m]);
      }
    };
    int64_t k = 0;
    for (; k + 64 <= count; k += 64) add(k, ~(__mmask64)0);
    if (k < count) add(k, first(count - k));
    int32_t folded[16];
    _mm512_storeu_si512(folded, fold(acc));
    for (int m = 0; m < kRows; ++m)
      for (int o = 0; o < kOuts; ++o)
        sums[m][at + o] = folded[m * kOuts + o] - 128 * totals[m];
  }
}

#else

static inline int32_t total(const int8_t *, int64_t) { return 0; }

template <int kRows>
static inline void products(const int8_t *x, int64_t row, const int8_t *const *w, int64_t count,
                            const int32_t *, Ints *sums) {
  for (int o = 0; o < 16; ++o)
    for (int m = 0; m < kRows; ++m) {
      const int8_t *a = x + m * row, *b = w[o];
      int32_t sum = 0;
      for (int64_t k = 0; k < count; ++k) sum += (int32_t)a[k] * b[k];  // a pattern compilers know
      sums[m][o] = sum;
    }
}

#endif

}  // namespace manyheads
