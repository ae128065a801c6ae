// Linear attention by the token: S <- diag(e^g) S + k v^T, o = q S; without gates S <- S + k v^T.
//
// P pairs (batch and head), N tokens, D keys, V values. 64 values of a state stay in the nearest
// cache while all tokens pass over them; a state is read and written once, and nothing else of its
// size is made. For single tokens and short sequences: long ones are matrix products.
//
// Without it: a step of gla makes six passes over its state instead of one, and a short sequence
// pays for matrix products of its own size.

#include "gates.h"

namespace {

using namespace manyheads;

constexpr int64_t kSegment = 64;  // values

// The values [first, first + width) of one pair.
void pass(const float *query, const float *key, const float *value, const float *decay,
          const float *memory, float *next, float *out, int64_t tokens, int64_t D, int64_t V,
          int64_t width) {
  const int blocks = (int)((width + kLanes - 1) / kLanes);
  const int rest = (int)(width - (blocks - 1) * kLanes);
  auto count = [&](int i) { return i == blocks - 1 ? rest : kLanes; };
  const float *from_state = memory;
  if (tokens == 0) {
    for (int64_t d = 0; d < D; ++d)
      for (int i = 0; i < blocks; ++i)
        store_some(next + d * V + i * kLanes, load_some(memory + d * V + i * kLanes, count(i)),
                   count(i));
  }
  for (int64_t t = 0; t < tokens; ++t, from_state = next) {
    Floats read[kSegment / kLanes] = {}, values[kSegment / kLanes] = {};
    for (int i = 0; i < blocks; ++i) values[i] = load_some(value + t * V + i * kLanes, count(i));
    for (int64_t from = 0; from < D; from += kLanes) {
      const int some = (int)(D - from < kLanes ? D - from : kLanes);
      const Floats kept = decay ? exp(load_some(decay + t * D + from, some)) : splat(1.0f);
      for (int j = 0; j < some; ++j) {
        const int64_t d = from + j;
        const float k = key[t * D + d], q = query[t * D + d];
        for (int i = 0; i < blocks; ++i) {
          const int64_t at = d * V + i * kLanes;
          const Floats state = load_some(from_state + at, count(i)) * kept[j] + values[i] * k;
          store_some(next + at, state, count(i));
          read[i] += state * q;
        }
      }
    }
    for (int i = 0; i < blocks; ++i) store_some(out + t * V + i * kLanes, read[i], count(i));
  }
}

}  // namespace

extern "C" {

// query (P, N, D) with the scale in it, key, decay (P, N, D): the logarithm, or null for none;
// value, out (P, N, V); memory, next (P, D, V), may be the same. sizes: P, N, D, V, threads.
void recurrent_scan(const float *query, const float *key, const float *value, const float *decay,
                    const float *memory, float *next, float *out, const int64_t *sizes) {
  const int64_t N = sizes[1], D = sizes[2], V = sizes[3];
  const int64_t segments = (V + kSegment - 1) / kSegment, tasks = sizes[0] * segments;
  const bool many = sizes[0] * D * V * (N > 1 ? N : 1) > 65536;
#pragma omp parallel for schedule(static) num_threads(sizes[4]) if (many)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t pair = task / segments, first = task % segments * kSegment;
    const int64_t width = V - first < kSegment ? V - first : kSegment;
    const int64_t row = pair * N, state = pair * D * V + first;
    pass(query + row * D, key + row * D, value + row * V + first,
         decay ? decay + row * D : nullptr, memory + state, next + state, out + row * V + first, N,
         D, V, width);
  }
}
}
