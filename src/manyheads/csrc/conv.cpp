// Short depthwise causal convolutions with SiLU: forward, backward.
//
// y_t = silu(bias + sum_j w_j x_{t-W+1+j}) for each channel; B batch, N tokens, C channels, W taps.
// A task is a segment of the channels of one sequence, whose last W rows stay in the nearest cache.
// Everything lies as (B, N, C) does: what comes before and after are matrix products of that layout.
//
// Without it: the convolutions of mamba and gla take ten times as long, five with their backward.

#include <omp.h>

#include "gates.h"

namespace {

using namespace manyheads;

constexpr int64_t kSegment = 256;  // channels

struct Sizes {
  int64_t batch, length, channels, taps, threads;
  explicit Sizes(const int64_t *s)
      : batch(s[0]), length(s[1]), channels(s[2]), taps(s[3]), threads(s[4]) {}
  int64_t segments() const { return (channels + kSegment - 1) / kSegment; }
};

struct Source {  // x, and what came before it
  const float *x, *before;
  const int64_t *stride;  // of batch and token, for x and before
  int64_t taps;
  const float *row(int64_t b, int64_t t) const {
    return t >= 0 ? x + b * stride[0] + t * stride[1]
                  : before + b * stride[2] + (t + taps - 1) * stride[3];
  }
};

inline int width(int64_t c, int64_t last) {
  return (int)(last - c < kLanes ? last - c : kLanes);
}

}  // namespace

extern "C" {

// sizes: B, N, C, W, threads. before (B, W - 1, C). weight (W, C), bias (C) or null, y (B, N, C).
void conv_forward(const float *x, const float *before, const float *weight, const float *bias,
                  float *y, const int64_t *sizes, const int64_t *strides) {
  const Sizes n(sizes);
  const Source from{x, before, strides, n.taps};
  const int64_t C = n.channels, tasks = n.batch * n.segments();
  const bool many = n.batch * n.length * C > 32768;
#pragma omp parallel for schedule(static) num_threads(n.threads) if (many)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t b = task / n.segments(), first = task % n.segments() * kSegment;
    const int64_t last = first + kSegment < C ? first + kSegment : C;
    for (int64_t t = 0; t < n.length; ++t) {
      float *to = y + (b * n.length + t) * C;
      for (int64_t c = first; c < last; c += kLanes) {
        const int count = width(c, last);
        Floats sum = bias ? load_some(bias + c, count) : Floats{};
        for (int64_t j = 0; j < n.taps; ++j)
          sum += load_some(weight + j * C + c, count) *
                 load_some(from.row(b, t - n.taps + 1 + j) + c, count);
        store_some(to + c, sum * logistic(sum), count);
      }
    }
  }
}

// grad: of y, with strides 4 and 5 of batch and token. dx (B, N, C), dbefore (B, W - 1, C);
// dweight (B, W, C) and dbias (B, C): zeros, added to. scratch: 256 W numbers a thread.
void conv_backward(const float *x, const float *before, const float *weight, const float *bias,
                   const float *grad, float *dx, float *dbefore, float *dweight, float *dbias,
                   float *scratch, const int64_t *sizes, const int64_t *strides) {
  const Sizes n(sizes);
  const Source from{x, before, strides, n.taps};
  const int64_t C = n.channels, W = n.taps, N = n.length, tasks = n.batch * n.segments();
#pragma omp parallel for schedule(static) num_threads(n.threads)
  for (int64_t task = 0; task < tasks; ++task) {
    float *ring = scratch + omp_get_thread_num() * W * kSegment;  // gradients before the SiLU
    const int64_t b = task / n.segments(), first = task % n.segments() * kSegment;
    const int64_t last = first + kSegment < C ? first + kSegment : C;
    // Row t takes part in the gradients of rows t - W + 1 to t: that of t - W + 1 is then complete.
    for (int64_t t = 0; t < N + W - 1; ++t) {
      const int64_t done = t - W + 1;
      float *to = done >= 0 ? dx + (b * N + done) * C : dbefore + (b * (W - 1) + done + W - 1) * C;
      for (int64_t c = first; c < last; c += kLanes) {
        const int count = width(c, last);
        float *own = ring + (t % W) * kSegment + (c - first);
        if (t < N) {
          Floats sum = bias ? load_some(bias + c, count) : Floats{};
          for (int64_t j = 0; j < W; ++j)
            sum += load_some(weight + j * C + c, count) *
                   load_some(from.row(b, t - W + 1 + j) + c, count);
          const Floats open = logistic(sum);
          const Floats g = load_some(grad + b * strides[4] + t * strides[5] + c, count) * open *
                           (1.0f + sum * (1.0f - open));
          store_some(own, g, count);
          for (int64_t j = 0; j < W; ++j) {
            float *dw = dweight + (b * W + j) * C + c;
            store_some(dw, load_some(dw, count) +
                               g * load_some(from.row(b, t - W + 1 + j) + c, count), count);
          }
          float *db = dbias + b * C + c;
          store_some(db, load_some(db, count) + g, count);
        }
        Floats back = {};
        for (int64_t j = 0; j < W; ++j) {
          const int64_t s = done + W - 1 - j;  // the row whose tap j is `done`
          if (s >= 0 && s < N)
            back += load_some(weight + j * C + c, count) *
                    load_some(ring + (s % W) * kSegment + (c - first), count);
        }
        store_some(to + c, back, count);
      }
    }
  }
}
}
