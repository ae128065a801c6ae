// What gates and decays are made of, for 16 numbers at once: 2^x, softplus, logistic function.
#pragma once

#include "vec.h"

namespace manyheads {

static inline Floats load_some(const float *from, int count) {
  return count == kLanes ? load(from) : load(from, count);
}

static inline void store_some(float *to, Floats v, int count) {
  if (count == kLanes) {
    store(to, v);
  } else {
    store(to, v, count);
  }
}

// 2^x to about 1e-7 of itself for x up to 127, and what 127 gives beyond; 0 below -126; NaN stays
// NaN. For decays, whose exponents are below 0.
static inline Floats exp2_within(Floats x) {
  const float kMagic = 12582912.0f;  // 1.5 * 2^23
  const Ints gone = x < -126.0f;
  x = x > 127.0f ? splat(127.0f) : x;
  const Floats shifted = x + kMagic;  // its low bits hold the whole part
  const Floats f = x - (shifted - kMagic);
  Floats p = f * 1.5403530393e-4f + 1.3333558146e-3f;
  p = p * f + 9.6181291076e-3f;
  p = p * f + 5.5504108665e-2f;
  p = p * f + 2.4022650696e-1f;
  p = p * f + 6.9314718056e-1f;
  p = p * f + 1.0f;
  return (Floats)(((Ints)p + ((Ints)shifted << 23)) & ~gone);
}

constexpr float kLog2E = 1.44269504f;

static inline Floats magnitude(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

// 1 / (1 + e^-x)
static inline Floats logistic(Floats x) {
  const Floats u = exp(-magnitude(x));
  return (x < 0.0f ? u : splat(1.0f)) / (1.0f + u);
}

// log(1 + e^x) = max(x, 0) + log(1 + u), u = e^-|x|, with log(1 + u) = 2 atanh(u / (2 + u)).
static inline Floats softplus(Floats x) {
  const Floats u = exp(-magnitude(x)), s = u / (2.0f + u), r = s * s;
  Floats p = r * (1.0f / 15) + 1.0f / 13;
  p = p * r + 1.0f / 11;
  p = p * r + 1.0f / 9;
  p = p * r + 1.0f / 7;
  p = p * r + 1.0f / 5;
  p = p * r + 1.0f / 3;
  p = p * r + 1.0f;
  return larger(x, Floats{}) + 2.0f * s * p;
}

}  // namespace manyheads
