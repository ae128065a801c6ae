// y = x Wᵀ + b for a few rows x: each weight is read once, from memory, for all of them.
//
// A tile of R rows and O outputs has its R·O sums in registers, one lane for every sixteenth input.
// Weights are asked for a tile ahead: what a decoding step waits for is memory.
#pragma once

#include "vec.h"

namespace manyheads {

#ifdef __AVX512F__
constexpr int kRowSums = 16;  // of the 32 registers
#else
constexpr int kRowSums = 4;  // a vector takes two or four registers
#endif

struct FewRows {
  const float *x, *weight, *bias;  // (rows, inputs), (outputs, inputs), (outputs) or null
  float *out;                      // (rows, outputs)
  int64_t rows, inputs, outputs, stride;  // from a row of x to the next
};

// Outputs of a tile: as many sums as registers hold, but no more than 8 streams of weights.
constexpr int row_outputs(int rows) {
  const int most = kRowSums / rows;
  return most > 8 ? 8 : most < 1 ? 1 : most;
}

template <int R, int O>
inline void row_tile(const FewRows &t, int64_t row, int64_t output) {
  const float *x = t.x + row * t.stride, *w = t.weight + output * t.inputs;
  const int64_t next = O * t.inputs;
  Floats sums[R][O] = {};
  int64_t k = 0;
  for (; k + kLanes <= t.inputs; k += kLanes) {
    Floats left[R];
    for (int r = 0; r < R; ++r) left[r] = load(x + r * t.stride + k);
    for (int o = 0; o < O; ++o) {
      __builtin_prefetch(w + o * t.inputs + k + next, 0, 2);
      const Floats right = load(w + o * t.inputs + k);
      for (int r = 0; r < R; ++r) sums[r][o] += left[r] * right;
    }
  }
  if (k < t.inputs) {
    const int rest = int(t.inputs - k);
    for (int o = 0; o < O; ++o) {
      const Floats right = load(w + o * t.inputs + k, rest);
      for (int r = 0; r < R; ++r) sums[r][o] += load(x + r * t.stride + k, rest) * right;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o)
      t.out[(row + r) * t.outputs + output + o] =
          sum(sums[r][o]) + (t.bias ? t.bias[output + o] : 0.0f);
}

template <int R>
inline void row_block(const FewRows &t, int64_t row, int64_t begin, int64_t end) {
  constexpr int O = row_outputs(R);
  int64_t o = begin;
  for (; o + O <= end; o += O) row_tile<R, O>(t, row, o);
  for (; o < end; ++o) row_tile<R, 1>(t, row, o);
}

template <int R>
inline void row_rest(const FewRows &t, int64_t row, int64_t begin, int64_t end) {
  if constexpr (R > 0) {
    if (t.rows - row == R) return row_block<R>(t, row, begin, end);
    row_rest<R - 1>(t, row, begin, end);
  }
}

// Outputs begin..end: eight rows at a time, then what is left.
inline void row_slice(const FewRows &t, int64_t begin, int64_t end) {
  int64_t r = 0;
  for (; r + 8 <= t.rows; r += 8) row_block<8>(t, r, begin, end);
  row_rest<7>(t, r, begin, end);
}

// The share of one of `team` threads, in whole tiles.
inline void row_share(const FewRows &t, int64_t me, int64_t team) {
  const int64_t blocks = (t.outputs + 7) / 8;
  const int64_t begin = blocks * me / team * 8, end = blocks * (me + 1) / team * 8;
  row_slice(t, begin, end < t.outputs ? end : t.outputs);
}

}  // namespace manyheads
