// Attention of few queries to long caches: the segments of a plan, then their merge.
//
// The query heads of a key-value head and their tokens are rows. A segment reads a stretch of one
// head's keys and values once, 32 keys at a time, for all of its rows: scores, online softmax,
// weighted values; meanwhile the next 32 are fetched. Keys are found by pages: a padded cache is
// one page for each request, a packed one a page that begins with any token and has no end.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "lean.h"

namespace {

using namespace manyheads;

inline int64_t block(int64_t rows) {
  int64_t size = kRows;
  while (size > rows) size /= 2;
  return size;
}

template <class F>
inline void choose(int64_t size, F f) {
  if (size == 8)
    f(std::integral_constant<int, kRows>());
  else if (size == 4)
    f(std::integral_constant<int, 4>());
  else if (size == 2)
    f(std::integral_constant<int, 2>());
  else
    f(std::integral_constant<int, 1>());
}

void run_segment(const Task &t, const int64_t *s, float *scratch) {
  const int64_t dim = t.key.dim, width = vectors(dim) * kLanes;
  const int64_t value_width = vectors(t.value.dim) * kLanes;
  const int64_t request = s[kRequest], head = s[kHead], rows = t.group * s[kQueries];
  const int64_t length = t.lengths[request], end = std::min(s[kEnd] * t.tile, length);
  float *query = scratch, *weights = query + rows * width, *copies = weights + rows * kKeys;
  float *value_copies = copies + kKeys * width, *factors = value_copies + kKeys * value_width;
  const int64_t place = s[kPlace] * t.group;
  float *m = t.m + place, *l = t.l + place, *o = t.o + place * value_width;
  std::fill_n(m, rows, kNothing);
  std::fill_n(l, rows, 0.0f);
  std::fill_n(o, rows * value_width, 0.0f);
  std::fill_n(query, rows * width, 0.0f);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t place = s[kQuery] + r % s[kQueries];
    const int64_t row = (request * t.heads + head) * t.group + r / s[kQueries];
    const float *from = t.query + (row * t.queries + place) * dim;
    for (int64_t i = 0; i < dim; ++i) {
      // In the overlap of the last two vectors the last one is 0.
      const int64_t v = i / kLanes;
      query[r * width + v * kLanes + i - column(v, dim)] = from[i] * t.scale;
    }
  }
  const bool copied = t.dtype != kFloat;
  const bool copy_key = copied || dim < kLanes, copy_value = copied || t.value.dim < kLanes;
  Addresses key[2], value[2];
  auto look = [&](int which, int64_t first) {
    const int64_t number = std::max<int64_t>(0, std::min(kKeys, end - first));
    key[which].find(t, t.key, request, head, first, number);
    value[which].find(t, t.value, request, head, first, number);
  };
  int now = 0;
  look(now, s[kFirst] * t.tile);
  for (int64_t first = s[kFirst] * t.tile; first < end; first += kKeys, now = 1 - now) {
    look(1 - now, first + kKeys);
    if (copy_key) widen_rows(key[now], t.key, t.dtype, copies);
    if (copy_value) widen_rows(value[now], t.value, t.dtype, value_copies);
    const Rows keys = {key[now], key[1 - now], dim, kLanes * t.key.bytes};
    const Rows values = {value[now], value[1 - now], t.value.dim, kLanes * t.value.bytes};
    const bool more = key[1 - now].count > 0;
    // All rows meet the keys, then the values: each are in the nearest cache from the first on.
    for (int64_t r = 0, size; r < rows; r += size) {
      size = block(rows - r);
      int64_t limits[kRows], least = kKeys;
      for (int64_t i = 0; t.is_causal && i < size; ++i) {
        limits[i] = s[kQuery] + (r + i) % s[kQueries] + length - t.queries + 1 - first;
        least = std::min(least, limits[i]);
      }
      const int64_t *hidden = least < key[now].count ? limits : nullptr;
      choose(size, [&](auto number) {
        weigh<number>(query + r * width, keys, hidden, more && r == 0, m + r, l + r,
                      weights + r * kKeys, factors + r);
      });
    }
    for (int64_t r = 0, size; r < rows; r += size) {
      size = block(rows - r);
      choose(size, [&](auto number) {
        gather_from<number, 8>(weights + r * kKeys, factors + r, values, 0, more && r == 0,
                               o + r * value_width);
      });
    }
  }
}

// Merges segments s, s + 1, ... up to the next host: all of one output tile.
void merge(const Task &t, int64_t s, int64_t number) {
  const int64_t *host = t.segments + s * kColumns;
  int64_t stop = s + 1;
  while (stop < number && !t.segments[stop * kColumns + kHost]) ++stop;
  const int64_t dim = t.value.dim, width = vectors(dim) * kLanes;
  for (int64_t r = 0; r < t.group * host[kQueries]; ++r) {
    const int64_t place =
        ((host[kRequest] * t.heads + host[kHead]) * t.group + r / host[kQueries]) * t.queries +
        host[kQuery] + r % host[kQueries];
    float best = kNothing, total = 0;
    for (int64_t i = s; i < stop; ++i)
      best = std::max(best, t.m[t.segments[i * kColumns + kPlace] * t.group + r]);
    if (best == kNothing) continue;  // nothing was seen: out is 0 and lse -inf from the start
    float *out = t.out + place * dim;
    float *sum = t.o + (host[kPlace] * t.group + r) * width;
    for (int64_t i = s; i < stop; ++i) {
      const int64_t from = t.segments[i * kColumns + kPlace] * t.group + r;
      const float weight = std::exp(t.m[from] - best);
      total += weight * t.l[from];
      const float *part = t.o + from * width;
      for (int64_t c = 0; c < width; c += kLanes)
        store(sum + c, (i == s ? Floats{} : load(sum + c)) + load(part + c) * weight);
    }
    t.lse[place] = best + std::log(total);
    for (int64_t v = 0; v < vectors(dim); ++v) {
      const Floats done = load(sum + v * kLanes) / total;
      if (dim < kLanes)
        store(out, done, (int)dim);
      else
        store(out + column(v, dim), done);
    }
  }
}

}  // namespace

extern "C" {

// out and lse come filled with 0 and -inf. Caches are given by address and element strides (page,
// head, token); segments (S, 8) in the order of the line, `borders` (workers + 1) those of each
// worker; scratch `each` floats for every thread.
void lean_decode(const float *query, const void *key, int64_t key_page, int64_t key_head,
                 int64_t key_token, const void *value, int64_t value_page, int64_t value_head,
                 int64_t value_token, int64_t dtype, const int64_t *pages, int64_t row_pages,
                 int64_t page, const int64_t *lengths, const int64_t *segments, int64_t number,
                 const int64_t *borders, int64_t workers, float *m, float *l, float *o, float *out,
                 float *lse, float *scratch, int64_t each, int64_t heads, int64_t group,
                 int64_t queries, int64_t dim, int64_t value_dim, int64_t tile, int64_t is_causal,
                 int64_t threads, float scale) {
  if (number < 1 || dim < 1 || value_dim < 1) return;
  const int64_t bytes = dtype == kFloat ? 4 : 2;
  const Task t = {query,
                  {(const char *)key, key_page, key_head, key_token, dim, bytes},
                  {(const char *)value, value_page, value_head, value_token, value_dim, bytes},
                  pages, lengths, segments, m, l, o, out, lse, heads, group, queries, row_pages,
                  page, tile, dtype, is_causal != 0, scale};
#pragma omp parallel num_threads((int)threads)
  {
    float *own = scratch + omp_get_thread_num() * each;
#pragma omp for schedule(dynamic, 1)
    for (int64_t w = 0; w < workers; ++w)
      for (int64_t s = borders[w]; s < borders[w + 1]; ++s)
        run_segment(t, segments + s * kColumns, own);
#pragma omp for schedule(static)
    for (int64_t s = 0; s < number; ++s)
      if (segments[s * kColumns + kHost]) merge(t, s, number);
  }
}

// Adds up `count` floats: what memory gives to a loop that does nothing else.
void lean_read(const float *from, int64_t count, float *total, int64_t threads) {
  float all = 0;
#pragma omp parallel num_threads((int)threads) reduction(+ : all)
  {
    const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t begin = count * me / team, end = count * (me + 1) / team;
    Floats sum[4] = {};
    int64_t i = begin;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
      __builtin_prefetch(from + i + 1024, 0, 2);
      __builtin_prefetch(from + i + 1040, 0, 2);
      __builtin_prefetch(from + i + 1056, 0, 2);
      __builtin_prefetch(from + i + 1072, 0, 2);
      for (int j = 0; j < 4; ++j) sum[j] += load(from + i + j * kLanes);
    }
    for (; i < end; ++i) all += from[i];
    all += manyheads::sum(sum[0] + sum[1] + sum[2] + sum[3]);
  }
  *total = all;
}

}  // extern "C"
