// A linear layer of 8-bit numbers: floats to codes, products, and sums to what they stand for.
//
// M rows, K inputs, O outputs.
#pragma once

#include <cmath>
#include <vector>

#include "int8.h"

namespace manyheads {

// The nearest whole number, halves to even; NaN becomes 0. Of what no code holds the sign is kept.
static inline Ints nearest_even(Floats x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: numbers beside it have no fraction
  x = x == x ? x : Floats{};
  x = x < 1000.0f ? x : splat(1000.0f);
  x = x > -1000.0f ? x : splat(-1000.0f);
  return __builtin_convertvector((x + kShift) - kShift, Ints);
}

static inline void encode_row_even(const float *x, int8_t *codes, int64_t count, float scale,
                                   int32_t zero) {
  for (int64_t c = 0; c < count; c += kLanes) {
    const int some = width(c, count);
    Ints code = nearest_even(load_some(x + c, some) / scale) + zero;
    code = code > 127 ? Ints{} + 127 : code;
    code = code < -128 ? Ints{} - 128 : code;
    store_bytes(codes + c, __builtin_convertvector(code, Bytes), some);
  }
}

// The scale that makes the largest magnitude of a row 127; NaN if the row holds one.
static inline float scale_of(const float *x, int64_t count) {
  Floats most = {};
  Ints broken = {};
  for (int64_t c = 0; c < count; c += kLanes) {
    const Floats v = load_some(x + c, width(c, count));
    broken |= (Ints)(v != v);
    most = larger(magnitude(v), most);
  }
  for (int i = 0; i < kLanes; ++i)
    if (broken[i]) return NAN;
  const float scale = largest(most) / 127.0f;
  return scale > 1e-8f ? scale : 1e-8f;
}

static inline void encode_rows(const float *x, int8_t *codes, const float *scale,
                               const int32_t *zero, float *row_scale, int64_t rows, int64_t inputs,
                               int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * inputs > 65536)
  for (int64_t m = 0; m < rows; ++m) {
    const float own = scale ? scale[0] : scale_of(x + m * inputs, inputs);
    if (!scale) row_scale[m] = own;
    encode_row_even(x + m * inputs, codes + m * inputs, inputs, own, zero ? zero[0] : 0);
  }
}

static inline Ints load_ints(const int32_t *from, int count) {
  return (Ints)load_some((const float *)from, count);
}

struct Linear {
  const int8_t *weight;                   // (O, K)
  const float *scale, *bias, *row_scale;  // (1) or (O); (O) or null; (M) or null
  const int32_t *offset;                  // (O), taken from the sums, or null
  int64_t inputs, outputs, per_channel;
};

// What sums of 16 outputs from o on stand for.
struct Finish {
  Floats scale, bias;
  Ints offset = {};
  int64_t o;
  int count;

  Finish(const Linear &n, int64_t from) : o(from), count(width(from, n.outputs)) {
    scale = n.per_channel ? load_some(n.scale + o, count) : splat(n.scale[0]);
    bias = n.bias ? load_some(n.bias + o, count) : Floats{};
    if (n.offset) offset = load_ints(n.offset + o, count);
  }

  void operator()(const Linear &n, int64_t m, Ints sums, float *out, int8_t *codes) const {
    Floats y = real(sums - offset) * scale;
    if (n.row_scale) y *= n.row_scale[m];
    if (n.bias) {
      // A detour over memory: the sum below must not be fused, PyTorch's numbers are rounded twice.
      asm volatile("" : "+m"(y));
      y += bias;
    }
    if (out) store_some(out + m * n.outputs + o, y, count);
    if (codes) store_bytes(codes + m * n.outputs + o, encode(y), count);
  }
};

// (M, K) rows of x, `row` bytes apart, to floats or codes (M, O), whichever is not null.
static inline void linear(const Linear &n, const int8_t *x, int64_t row, int64_t rows,
                          const int32_t *totals, float *out, int8_t *codes, int64_t threads) {
  const int64_t blocks = (n.outputs + kLanes - 1) / kLanes;
  // A few microseconds of work are not worth waking threads for.
  const bool many = rows * n.outputs * n.inputs > (1 << 19);
#pragma omp parallel for schedule(static) num_threads(threads) if (many)
  for (int64_t block = 0; block < blocks; ++block) {
    const Finish finish(n, block * kLanes);
    const int8_t *w[kLanes];
    for (int i = 0; i < kLanes; ++i)  // the last row again where there are fewer
      w[i] = n.weight + (finish.o + (i < finish.count ? i : finish.count - 1)) * n.inputs;
    for (int64_t m = 0; m < rows;) {
      const int some = rows - m >= 4 ? 4 : 1;
      Ints sums[4];
      if (some == 4) {
        products<4>(x + m * row, row, w, n.inputs, totals + m, sums);
      } else {
        products<1>(x + m * row, row, w, n.inputs, totals + m, sums);
      }
      for (int i = 0; i < some; ++i, ++m) finish(n, m, sums[i], out, codes);
    }
  }
}

static inline std::vector<int32_t> totals_of(const int8_t *x, int64_t row, int64_t rows,
                                             int64_t count) {
  std::vector<int32_t> totals(rows);
  for (int64_t m = 0; m < rows; ++m) totals[m] = total(x + m * row, count);
  return totals;
}

static inline void one_row(const int8_t *weight, const float *scale, const float *bias,
                           int64_t inputs, int64_t outputs, const int8_t *x, float *out,
                           int8_t *codes, int64_t threads) {
  const Linear n{weight, scale, bias, nullptr, nullptr, inputs, outputs, 0};
  const int32_t sum = total(x, inputs);
  linear(n, x, inputs, 1, &sum, out, codes, threads);
}

}  // namespace manyheads
