// Landmark attention by the token: scores landmarks, chooses blocks, attends to them where they lie.
//
// B samples, H query heads, K key heads, S stored blocks of L tokens in a ring, k that are fetched,
// D keys, V values. A head's landmarks are scored, its blocks chosen, every fetched block attended to
// by itself, then their common softmax taken.
// Keys lie before their rotary embedding: the query is turned back instead, by
// R(-t) q = cos(t) q + sin(t) q', q' being q with the channels of each pair exchanged and the sign in
// the table.
//
// Without it: a token takes many small operators, and copies every block that it fetches.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "vec.h"

namespace {

using namespace manyheads;

constexpr int64_t kStretch = 256;  // landmarks that are scored at a time

struct Stream {
  int64_t batch, heads, kv, dim, value_dim, size, stored, seen, top_k, tail, at;
  int64_t gate_room, room, exact, interleaved, shared;
  float scale;
  const float *query, *key, *value, *tail_key, *tail_value, *gates, *lengths, *keys, *values;
  const float *frequency, *cosine, *sine;  // null: no rotary embedding

  int64_t group() const { return heads / kv; }
  int64_t fetched() const { return std::min(top_k, stored); }
  int64_t width() const { return (dim + kLanes - 1) / kLanes * kLanes; }
  int64_t value_width() const { return (value_dim + kLanes - 1) / kLanes * kLanes; }
  // Pairs are read by their place in the ring, then the sample and the key head.
  int64_t ring(int64_t number, int64_t places, int64_t b, int64_t h) const {
    return ((number % places) * batch + b) * kv + h;
  }
};

inline int lanes(int64_t from, int64_t count) {
  return count - from < kLanes ? (int)(count - from) : kLanes;
}

inline Floats some(const float *from, int count) {
  return count == kLanes ? load(from) : load(from, count);
}

// `a` has whole vectors.
inline float dot(const float *a, const float *b, int64_t count) {
  Floats total = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) total += load(a + i) * load(b + i);
  if (i < count) total += load(a + i) * load(b + i, (int)(count - i));
  return sum(total);
}

// The query turned to `place`, and with the channels of its pairs exchanged.
void turn(const Stream &s, const float *query, int64_t place, float *turned, float *other) {
  std::fill_n(turned, s.width(), 0.0f);
  if (other) std::fill_n(other, s.width(), 0.0f);
  if (!s.frequency) {
    std::copy_n(query, s.dim, turned);
    return;
  }
  for (int64_t i = 0; i < s.dim / 2; ++i) {
    const float angle = (float)place * s.frequency[i];
    const float c = std::cos(angle), z = std::sin(angle);
    const int64_t a = s.interleaved ? 2 * i : i, b = s.interleaved ? a + 1 : i + s.dim / 2;
    turned[a] = query[a] * c - query[b] * z;
    turned[b] = query[a] * z + query[b] * c;
    if (other) other[a] = turned[b], other[b] = turned[a];
  }
}

// The score of a key that stands `place` tokens behind where the query was turned back to.
inline float score(const Stream &s, const float *turned, const float *other, const float *key,
                   int64_t place) {
  if (!s.frequency) return dot(turned, key, s.dim) * s.scale;
  const float *c = s.cosine + place * s.dim, *z = s.sine + place * s.dim;
  Floats total = {};
  int64_t i = 0;
  for (; i + kLanes <= s.dim; i += kLanes)
    total += load(key + i) * (load(c + i) * load(turned + i) + load(z + i) * load(other + i));
  if (const int rest = (int)(s.dim - i))
    total += load(key + i, rest) *
             (load(c + i, rest) * load(turned + i) + load(z + i, rest) * load(other + i));
  return sum(total) * s.scale;
}

// A row's scores (S), oldest first, of one stretch of landmarks.
void score_stretch(const Stream &s, int64_t row, int64_t first, float *scores, float *turned) {
  const int64_t b = row / s.heads, h = row % s.heads / s.group();
  const int64_t last = std::min(first + kStretch, s.stored);
  // The newest blocks have slots of their own; it is the query that is turned back.
  const int64_t newest = s.exact || !s.frequency ? 0 : s.fetched(), old = s.stored - newest;
  const float *query = s.query + row * s.dim;
  turn(s, query, s.at, turned, nullptr);
  for (int64_t i = first; i < last; ++i) {
    if (i >= old) {
      const int64_t slot = s.top_k - newest + 1 + i - old;
      turn(s, query, s.at - slot * s.size, turned, nullptr);
    }
    const int64_t from = s.ring(s.seen - s.stored + i, s.gate_room, b, h);
    scores[i] = dot(turned, s.gates + from * s.dim, s.dim) * s.scale;
  }
}

// What rounding may change in a row's scores.
float slack(const Stream &s, int64_t row) {
  const int64_t b = row / s.heads, h = row % s.heads / s.group();
  float longest = 0, square = 0;
  for (int64_t i = 0; i < s.stored; ++i)
    longest = std::max(longest, s.lengths[s.ring(s.seen - s.stored + i, s.gate_room, b, h)]);
  for (int64_t i = 0; i < s.dim; ++i) {
    const float x = s.query[row * s.dim + i];
    square += x * x;
  }
  return std::sqrt(square) * longest * (8 * FLT_EPSILON * s.scale);
}

// The numbers of the best blocks, oldest first; the newest where scores are equal within `near`.
void choose(const Stream &s, const float *scores, float near, int64_t *picked) {
  const int64_t count = s.fetched();
  std::vector<float> best(scores, scores + count);
  std::make_heap(best.begin(), best.end(), std::greater<float>());
  for (int64_t i = count; i < s.stored; ++i) {
    if (!(scores[i] > best.front())) continue;
    std::pop_heap(best.begin(), best.end(), std::greater<float>());
    best.back() = scores[i];
    std::push_heap(best.begin(), best.end(), std::greater<float>());
  }
  const float least = best.front();
  int64_t above = 0, found = 0;
  for (int64_t i = 0; i < s.stored; ++i) above += scores[i] > least + near;
  int64_t equal = count - above;
  for (int64_t i = s.stored - 1; i >= 0 && found < count; --i) {
    if (scores[i] > least + near)
      picked[count - ++found] = i;
    else if (equal > 0 && !(scores[i] < least - near))
      --equal, picked[count - ++found] = i;
  }
  // Only scores that are no numbers leave places open.
  for (int64_t i = 0; i < count - found; ++i) picked[i] = i;
  for (int64_t i = 0; i < count; ++i) picked[i] += s.seen - s.stored;
}

// One choice for all heads of a sample: each landmark by the head that gives it most.
void choose_shared(const Stream &s, float *scores, int64_t b, int64_t *picked) {
  float near = 0;
  float *best = scores + b * s.heads * s.stored;
  for (int64_t h = 0; h < s.heads; ++h) {
    const int64_t row = b * s.heads + h;
    float *own = scores + row * s.stored, total = 0;
    const float top = *std::max_element(own, own + s.stored);
    for (int64_t i = 0; i < s.stored; ++i) total += std::exp(own[i] - top);
    const float all = top + std::log(total);
    for (int64_t i = 0; i < s.stored; ++i)
      best[i] = h ? std::max(best[i], own[i] - all) : own[i] - all;
    near = std::max(near, slack(s, row));
  }
  const int64_t count = s.fetched();
  int64_t *first = picked + b * s.heads * count;
  choose(s, best, near, first);
  for (int64_t h = 1; h < s.heads; ++h) std::copy_n(first, count, first + h * count);
}

// weights of `count` scores: e^(s - max), in place; returns the logarithm of the scores' sum.
float soften(float *scores, int64_t count, float *share) {
  float top = -INFINITY, total = 0;
  for (int64_t i = 0; i < count; ++i) top = std::max(top, scores[i]);
  for (int64_t i = 0; i < count; i += kLanes) {
    const int n = lanes(i, count);
    Floats weight = exp(some(scores + i, n) - top);
    store(scores + i, weight, n);
    for (int j = 0; j < n; ++j) total += weight[j];
  }
  *share = 1 / total;
  return top + std::log(total);
}

// out (value_width) += weights x values, rows of V.
void gather(const Stream &s, const float *weights, const float *values, int64_t count, float *out) {
  for (int64_t v = 0; v < s.value_dim; v += 4 * kLanes) {
    const int64_t left = s.value_dim - v;
    if (left >= 4 * kLanes) {
      Floats sums[4];
      for (int j = 0; j < 4; ++j) sums[j] = load(out + v + j * kLanes);
      for (int64_t i = 0; i < count; ++i)
        for (int j = 0; j < 4; ++j)
          sums[j] += weights[i] * load(values + i * s.value_dim + v + j * kLanes);
      for (int j = 0; j < 4; ++j) store(out + v + j * kLanes, sums[j]);
    } else {
      for (int64_t c = v; c < s.value_dim; c += kLanes) {
        Floats total = load(out + c);
        for (int64_t i = 0; i < count; ++i)
          total += weights[i] * some(values + i * s.value_dim + c, lanes(c, s.value_dim));
        store(out + c, total);
      }
    }
  }
}

// A fetched block's values under its own softmax, times nothing yet; returns its landmark's score.
float block(const Stream &s, int64_t row, const int64_t *picked, int64_t rank, float *scratch,
            float *out) {
  const int64_t b = row / s.heads, h = row % s.heads / s.group(), number = picked[rank];
  int64_t base = number * s.size;
  if (!s.exact)
    base = (s.top_k - s.fetched() + rank + (number >= s.seen - s.top_k)) * s.size;
  float *turned = scratch, *other = turned + s.width(), *scores = other + s.width(), share;
  turn(s, s.query + row * s.dim, s.at - base, turned, other);
  const int64_t from = s.ring(number, s.room, b, h) * s.size;
  for (int64_t t = 0; t < s.size; ++t)
    scores[t] = score(s, turned, other, s.keys + (from + t) * s.dim, t);
  soften(scores, s.size - 1, &share);
  gather(s, scores, s.values + from * s.value_dim, s.size - 1, out);
  for (int64_t v = 0; v < s.value_width(); v += kLanes) store(out + v, load(out + v) * share);
  return scores[s.size - 1];
}

// The token's own block: what came before it and the token itself, unless that is the landmark.
float own_block(const Stream &s, int64_t row, float *scratch, float *out) {
  const int64_t b = row / s.heads, h = row % s.heads / s.group(), pair = b * s.kv + h;
  float *turned = scratch, *other = turned + s.width(), *scores = other + s.width(), share;
  turn(s, s.query + row * s.dim, s.tail, turned, other);
  const int64_t before = s.tail, self = before + 1 < s.size;
  for (int64_t t = 0; t < before; ++t)
    scores[t] = score(s, turned, other, s.tail_key + (pair * before + t) * s.dim, t);
  if (self) scores[before] = score(s, turned, other, s.key + pair * s.dim, before);
  const float all = soften(scores, before + self, &share);
  if (before) gather(s, scores, s.tail_value + pair * before * s.value_dim, before, out);
  if (self) gather(s, scores + before, s.value + pair * s.value_dim, 1, out);
  for (int64_t v = 0; v < s.value_width(); v += kLanes) store(out + v, load(out + v) * share);
  return all;
}

// The common softmax of a row's parts, by their logits.
void join(const Stream &s, int64_t row, float *logits, const float *parts, float *out) {
  const int64_t each = s.fetched() + 1, wide = s.value_width();
  float *weights = logits + row * each, share;
  const float *first = parts + row * each * wide;
  soften(weights, each, &share);
  for (int64_t v = 0; v < wide; v += kLanes) {
    Floats total = {};
    for (int64_t i = 0; i < each; ++i) total += weights[i] * load(first + i * wide + v);
    store(out + row * s.value_dim + v, total * share, lanes(v, s.value_dim));
  }
}

}  // namespace

extern "C" {

// query (B, H, D), key (B, K, D), value (B, K, V), tail_key and tail_value (B, K, tail, D and V),
// gates (gate_room, B, K, D), lengths (gate_room, B, K), keys and values (room, B, K, L, D and V);
// frequency (D / 2), cosine and sine (L, D), or null. scores (B, H, S), picked (B, H, k), parts
// (B, H, k + 1, value_width), logits (B, H, k + 1), scratch (threads, 2 width + L), out (B, H, V).
// sizes: B, H, K, D, V, L, S, blocks seen, top_k, tail, place of the query, gate_room, room, exact,
// interleaved, shared, threads.
void landmark_decode(const float *query, const float *key, const float *value,
                     const float *tail_key, const float *tail_value, const float *gates,
                     const float *lengths, const float *keys, const float *values,
                     const float *frequency, const float *cosine, const float *sine, float *scores,
                     int64_t *picked, float *parts, float *logits, float *scratch, float *out,
                     const int64_t *z, float scale) {
  const Stream s{z[0],  z[1],  z[2],  z[3],  z[4],  z[5],  z[6],     z[7],   z[8],
                 z[9],  z[10], z[11], z[12], z[13], z[14], z[15],    scale,  query,
                 key,   value, tail_key, tail_value, gates, lengths, keys,   values,
                 frequency, cosine, sine};
  const int64_t rows = s.batch * s.heads, count = s.fetched(), each = count + 1;
  const int64_t stretches = (s.stored + kStretch - 1) / kStretch, wide = s.value_width();
  auto attend = [&](int64_t row, int64_t rank, float *own) {
    const int64_t i = row * each + rank;
    float *part = parts + i * wide;
    std::fill_n(part, wide, 0.0f);
    logits[i] = rank < count ? block(s, row, picked + row * count, rank, own, part)
                             : own_block(s, row, own, part);
  };
  // A row by one thread, from its scores to its output, waits for no other: waiting is long where
  // other programs have the cores. A few rows, or a choice that they share, go stage by stage.
  const bool apart = !s.shared && rows >= z[16];
#pragma omp parallel num_threads((int)z[16])
  {
    float *own = nullptr;
#pragma omp critical(landmark_scratch)
    own = scratch, scratch += 2 * s.width() + s.size;
    if (apart) {
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t row = 0; row < rows; ++row) {
        float *to = scores + row * s.stored;
        for (int64_t i = 0; i < s.stored; i += kStretch) score_stretch(s, row, i, to, own);
        choose(s, to, slack(s, row), picked + row * count);
        for (int64_t rank = 0; rank < each; ++rank) attend(row, rank, own);
        join(s, row, logits, parts, out);
      }
    } else {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < rows * stretches; ++i) {
        const int64_t row = i / stretches, first = i % stretches * kStretch;
        score_stretch(s, row, first, scores + row * s.stored, own);
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < (s.shared ? s.batch : rows); ++i) {
        if (s.shared)
          choose_shared(s, scores, i, picked);
        else
          choose(s, scores + i * s.stored, slack(s, i), picked + i * count);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < rows * each; ++i) attend(i / each, i % each, own);
#pragma omp for schedule(static)
      for (int64_t row = 0; row < rows; ++row) join(s, row, logits, parts, out);
    }
  }
}
}
