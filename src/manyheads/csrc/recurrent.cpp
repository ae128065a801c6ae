// Gated linear attention by the token: S <- diag(e^g) S + k v^T, o = q S.
//
// P pairs (batch and head), D keys, V values. A state is read and written once; nothing else of its
// size is made.
//
// Without it: a step of gla makes six passes over its state instead of one.

#include "gates.h"

namespace {
constexpr int64_t kSegment = 64;  // values
}

extern "C" {

// query (P, D) with the scale in it, key, decay (P, D): the logarithm; value, out (P, V); memory,
// next (P, D, V), may be the same. sizes: P, D, V, threads.
void recurrent_step(const float *query, const float *key, const float *value, const float *decay,
                    const float *memory, float *next, float *out, const int64_t *sizes) {
  using namespace manyheads;
  const int64_t D = sizes[1], V = sizes[2];
  const int64_t segments = (V + kSegment - 1) / kSegment, tasks = sizes[0] * segments;
  const bool many = sizes[0] * D * V > 65536;
#pragma omp parallel for schedule(static) num_threads(sizes[3]) if (many)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t pair = task / segments, first = task % segments * kSegment;
    const int64_t width = V - first < kSegment ? V - first : kSegment;
    const int blocks = (int)((width + kLanes - 1) / kLanes);
    const int rest = (int)(width - (blocks - 1) * kLanes);
    auto count = [&](int i) { return i == blocks - 1 ? rest : kLanes; };
    Floats read[kSegment / kLanes] = {}, values[kSegment / kLanes] = {};
    for (int i = 0; i < blocks; ++i)
      values[i] = load_some(value + pair * V + first + i * kLanes, count(i));
    for (int64_t from = 0; from < D; from += kLanes) {
      const int some = (int)(D - from < kLanes ? D - from : kLanes);
      const Floats kept = exp(load_some(decay + pair * D + from, some));
      for (int j = 0; j < some; ++j) {
        const int64_t d = pair * D + from + j, at = d * V + first;
        for (int i = 0; i < blocks; ++i) {
          const Floats state =
              load_some(memory + at + i * kLanes, count(i)) * kept[j] + values[i] * key[d];
          store_some(next + at + i * kLanes, state, count(i));
          read[i] += state * query[d];
        }
      }
    }
    for (int i = 0; i < blocks; ++i)
      store_some(out + pair * V + first + i * kLanes, read[i], count(i));
  }
}
}
