// Softmax attention of one query over every prefix (aaren): forward, backward.
//
// R rows (batch and head), N tokens, V values. One state a row is carried over the tokens: m, the
// largest score yet, u = sum of e^(s - m) and w = sum of e^(s - m) v; values stand in the lanes of
// vectors. A task is a row and a segment of its values: m and u cost little and each has its own.
// The backward carries the gradients of w and u the other way, relative to the m of each token.
//
// Without it: aaren takes five times as long, forward and backward.

#include <cmath>

#include "gates.h"

namespace {

using namespace manyheads;

constexpr int64_t kSegment = 64;  // values

struct Sizes {
  int64_t rows, length, values, threads;
  explicit Sizes(const int64_t *s) : rows(s[0]), length(s[1]), values(s[2]), threads(s[3]) {}
  // At least one: scores have gradients and states even where there are no values.
  int64_t segments() const { return values ? (values + kSegment - 1) / kSegment : 1; }
};

// Of 16 tokens from t: e^(s - m) and e^(m before - m). Exponentials are made for all at once.
struct Weights {
  float own[kLanes], kept[kLanes];
  Weights(const float *s, const float *m, float before, int64_t t, int64_t length) {
    const int count = (int)(length - t < kLanes ? length - t : kLanes);
    Floats here = load_some(m + t, count), score = load_some(s + t, count), last = {};
    for (int i = 0; i < count; ++i) last[i] = i + t ? m[t + i - 1] : before;
    const Floats lowest = splat(-INFINITY);
    const Floats base = here == lowest ? Floats{} : here;
    store(own, exp(score - base));
    store(kept, exp(last - base));
  }
};

}  // namespace

extern "C" {

// scores (R, N); values, out (R, N, V); m_first, u_first (R), w_first (R, V): the state before;
// m, u (R, N), w (R, V): those after each token, and the last. sizes: R, N, V, threads.
void prefix_forward(const float *scores, const float *values, const float *m_first,
                    const float *u_first, const float *w_first, float *out, float *m, float *u,
                    float *w, const int64_t *sizes) {
  const Sizes n(sizes);
  const int64_t N = n.length, V = n.values, tasks = n.rows * n.segments();
  const bool many = n.rows * N * V > 32768;
#pragma omp parallel for schedule(static) num_threads(n.threads) if (many)
  for (int64_t row = 0; row < n.rows; ++row) {
    float top = m_first[row];
    for (int64_t t = 0; t < N; ++t) {
      const float s = scores[row * N + t];
      top = s > top || s != s ? s : top;
      m[row * N + t] = top;
    }
  }
#pragma omp parallel for schedule(static) num_threads(n.threads) if (many)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t row = task / n.segments(), first = task % n.segments() * kSegment;
    const int64_t width = V - first < kSegment ? V - first : kSegment;
    const int blocks = (int)((width + kLanes - 1) / kLanes);
    Floats held[kSegment / kLanes] = {};
    const int rest = (int)(width - (blocks - 1) * kLanes);
    auto count = [&](int i) { return i == blocks - 1 ? rest : kLanes; };
    for (int i = 0; i < blocks; ++i)
      held[i] = load_some(w_first + row * V + first + i * kLanes, count(i));
    float total = u_first[row];
    for (int64_t t = 0; t < N; t += kLanes) {
      const Weights by(scores + row * N, m + row * N, m_first[row], t, N);
      for (int64_t j = t; j < N && j < t + kLanes; ++j) {
        const float own = by.own[j - t], kept = by.kept[j - t];
        total = total * kept + own;
        if (first == 0) u[row * N + j] = total;
        const float inverse = total > 0 ? 1 / total : 0.0f;
        const float *v = values + (row * N + j) * V + first;
        float *to = out + (row * N + j) * V + first;
        for (int i = 0; i < blocks; ++i) {
          held[i] = held[i] * kept + load_some(v + i * kLanes, count(i)) * own;
          store_some(to + i * kLanes, held[i] * inverse, count(i));
        }
      }
    }
    for (int i = 0; i < blocks; ++i)
      store_some(w + row * V + first + i * kLanes, held[i], count(i));
  }
}

// grad_out (R, N, V), grad_u (R, N): of u after each token; grad_last (R, V): of the last w.
// grad_values (R, N, V); grad_scores (segments, R, N) and grad_u_first (segments, R): a part of
// the sum in each; grad_w_first (R, V).
void prefix_backward(const float *scores, const float *values, const float *m_first,
                     const float *out, const float *m, const float *u, const float *grad_out,
                     const float *grad_u, const float *grad_last, float *grad_scores,
                     float *grad_values, float *grad_u_first, float *grad_w_first,
                     const int64_t *sizes) {
  const Sizes n(sizes);
  const int64_t N = n.length, V = n.values, tasks = n.rows * n.segments();
#pragma omp parallel for schedule(static) num_threads(n.threads)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t row = task / n.segments(), segment = task % n.segments();
    const int64_t first = segment * kSegment;
    const int64_t width = V - first < kSegment ? V - first : kSegment;
    const int blocks = (int)((width + kLanes - 1) / kLanes);
    const int rest = (int)(width - (blocks - 1) * kLanes);
    auto count = [&](int i) { return i == blocks - 1 ? rest : kLanes; };
    Floats held[kSegment / kLanes] = {};
    for (int i = 0; i < blocks; ++i)
      held[i] = load_some(grad_last + row * V + first + i * kLanes, count(i));
    float of_u = 0;
    for (int64_t t = (N - 1) / kLanes * kLanes; t >= 0 && N; t -= kLanes) {
      const Weights by(scores + row * N, m + row * N, m_first[row], t, N);
      for (int64_t j = (N < t + kLanes ? N : t + kLanes) - 1; j >= t; --j) {
        const float own = by.own[j - t], kept = by.kept[j - t], total = u[row * N + j];
        const float inverse = total > 0 ? 1 / total : 0.0f;
        const int64_t at = (row * N + j) * V + first;
        Floats read = {}, entered = {};
        for (int i = 0; i < blocks; ++i) {
          const int64_t c = at + i * kLanes;
          const Floats dw = load_some(grad_out + c, count(i)) * inverse;
          held[i] += dw;
          read += dw * load_some(out + c, count(i));
          entered += held[i] * load_some(values + c, count(i));
          store_some(grad_values + c, held[i] * own, count(i));
          held[i] *= kept;
        }
        of_u += (segment ? 0.0f : grad_u[row * N + j]) - sum(read);
        grad_scores[segment * n.rows * N + row * N + j] = own * (sum(entered) + of_u);
        of_u *= kept;
      }
    }
    grad_u_first[segment * n.rows + row] = of_u;
    for (int i = 0; i < blocks; ++i)
      store_some(grad_w_first + row * V + first + i * kLanes, held[i], count(i));
  }
}
}
