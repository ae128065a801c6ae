// Vectors of 16 floats by the compilers' own extension: one register with AVX-512, two with AVX2,
// four with NEON. Loads and stores need no alignment.
#pragma once

#include <cstdint>
#include <cstring>

namespace manyheads {

constexpr int kLanes = 16;
typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));

static inline Floats load(const float *from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// The first `count` numbers, then zeros.
static inline Floats load(const float *from, int count) {
  Floats v = {};
  std::memcpy(&v, from, sizeof(float) * count);
  return v;
}

static inline void store(float *to, Floats v) { std::memcpy(to, &v, sizeof v); }

static inline void store(float *to, Floats v, int count) {
  std::memcpy(to, &v, sizeof(float) * count);
}

static inline Floats splat(float x) { return x - Floats{}; }

static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// The lanes in the order that a constant index vector gives.
#if defined(__clang__)
#define MANYHEADS_TURN(v, by)                                                                  \
  __builtin_shufflevector(v, v, (0 ^ by), (1 ^ by), (2 ^ by), (3 ^ by), (4 ^ by), (5 ^ by),    \
                          (6 ^ by), (7 ^ by), (8 ^ by), (9 ^ by), (10 ^ by), (11 ^ by),        \
                          (12 ^ by), (13 ^ by), (14 ^ by), (15 ^ by))
#else
#define MANYHEADS_TURN(v, by)                                                                  \
  __builtin_shuffle(v, Ints{0 ^ by, 1 ^ by, 2 ^ by, 3 ^ by, 4 ^ by, 5 ^ by, 6 ^ by, 7 ^ by,    \
                            8 ^ by, 9 ^ by, 10 ^ by, 11 ^ by, 12 ^ by, 13 ^ by, 14 ^ by, 15 ^ by})
#endif

static inline float sum(Floats v) {
  v += MANYHEADS_TURN(v, 8);
  v += MANYHEADS_TURN(v, 4);
  v += MANYHEADS_TURN(v, 2);
  v += MANYHEADS_TURN(v, 1);
  return v[0];
}

static inline float largest(Floats v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// e^x within 2 units of the last place; 0 below the smallest normal number, also for -inf; +inf
// above the largest; NaN stays NaN. x = n ln 2 + f with |f| <= ln 2 / 2 and a polynomial in f.
static inline Floats exp(Floats x) {
  const float kLow = -87.33654f, kHigh = 88.72283f, kMagic = 12582912.0f;  // 1.5 * 2^23
  Floats y = x < kLow ? splat(kLow) : x;
  y = y > kHigh ? splat(kHigh) : y;
  const Floats shifted = y * 1.44269504f + kMagic;  // its low bits hold n
  const Floats n = shifted - kMagic;
  const Floats f = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * (f * f) + f + 1.0f;
  // 2^n in two factors: n may be 128.
  const Ints whole = (Ints)shifted - (Ints)splat(kMagic);
  const Ints half = whole >> 1;
  const Floats low = (Floats)((half + 127) << 23), high = (Floats)((whole - half + 127) << 23);
  p = p * low * high;
  p = x < kLow ? Floats{} : p;
  return x > kHigh ? splat(__builtin_inff()) : p;
}

}  // namespace manyheads
