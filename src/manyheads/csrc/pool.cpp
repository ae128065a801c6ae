// Pooling blocks of a map: mean over a window, residual and the two norms around them.
//
// m = x + g rstd(x) (pool(x) - x), y = w (m - mean(m)) rstd(m) + b; g, w, b for each channel, mean
// and rstd over all places and channels of an image. What of the first norm does not cancel between
// pool and identity is its gain. B images, H rows, W columns, C channels, in this order in memory.
// Windows are summed down, then along, so that a number is read 2 k times instead of k^2.
//
// Without it: a fused PoolFormer goes six times over its maps instead of three.

#include <omp.h>

#include <cmath>

#include "gates.h"

namespace {

using namespace manyheads;

struct Sizes {
  int64_t batch, height, width, channels, window, threads;
  explicit Sizes(const int64_t *s)
      : batch(s[0]), height(s[1]), width(s[2]), channels(s[3]), window(s[4]), threads(s[5]) {}
  int64_t row() const { return width * channels; }
};

struct Moments {  // of a row: its mean, and the squares of distances from it
  double mean, squares;
};

inline int some(int64_t i, int64_t end) { return (int)(end - i < kLanes ? end - i : kLanes); }

Moments moments(const float *x, int64_t count) {
  const int64_t whole = count / kLanes * kLanes;
  Floats total = {}, squares = {};
  for (int64_t i = 0; i < whole; i += kLanes) total += load(x + i);
  float rest = 0;
  for (int64_t i = whole; i < count; ++i) rest += x[i];
  const float mean = (sum(total) + rest) / (float)count;
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Floats d = load(x + i) - mean;
    squares += d * d;
  }
  double all = sum(squares);
  for (int64_t i = whole; i < count; ++i) all += (double)(x[i] - mean) * (x[i] - mean);
  return {mean, all};
}

// Rows of one length, to mean and 1 / sqrt(variance + eps) of them all.
void join(const Moments *rows, int64_t height, int64_t count, float eps, float *mean, float *rstd) {
  double middle = 0, squares = 0;
  for (int64_t r = 0; r < height; ++r) middle += rows[r].mean;
  middle /= (double)height;
  for (int64_t r = 0; r < height; ++r) {
    const double d = rows[r].mean - middle;
    squares += rows[r].squares + (double)count * d * d;
  }
  *mean = (float)middle;
  *rstd = (float)(1.0 / std::sqrt(squares / ((double)count * (double)height) + (double)eps));
}

// Row r of m; down: W C numbers to work in.
void mix_row(const float *x, float *m, int64_t r, float rstd, const float *gain, float *down,
             const Sizes &n) {
  const int64_t half = n.window / 2, row = n.row(), C = n.channels;
  const int64_t top = r - half > 0 ? r - half : 0;
  const int64_t bottom = r + half < n.height - 1 ? r + half : n.height - 1;
  for (int64_t i = 0; i < row; i += kLanes) {
    const int count = some(i, row);
    Floats s = load_some(x + top * row + i, count);
    for (int64_t t = top + 1; t <= bottom; ++t) s += load_some(x + t * row + i, count);
    store_some(down + i, s, count);
  }
  for (int64_t c = 0; c < n.width; ++c) {
    const int64_t left = c - half > 0 ? c - half : 0;
    const int64_t right = c + half < n.width - 1 ? c + half : n.width - 1;
    const float share = 1.0f / (float)((bottom - top + 1) * (right - left + 1));
    for (int64_t i = 0; i < C; i += kLanes) {
      const int count = some(i, C);
      Floats s = load_some(down + left * C + i, count);
      for (int64_t t = left + 1; t <= right; ++t) s += load_some(down + t * C + i, count);
      const Floats own = load_some(x + r * row + c * C + i, count);
      const Floats g = load_some(gain + i, count) * rstd;
      store_some(m + r * row + c * C + i, own + g * (s * share - own), count);
    }
  }
}

void norm_row(const float *m, float *y, float mean, float rstd, const float *weight,
              const float *bias, const Sizes &n) {
  for (int64_t c = 0; c < n.width; ++c)
    for (int64_t i = 0; i < n.channels; i += kLanes) {
      const int count = some(i, n.channels);
      const Floats v = (load_some(m + c * n.channels + i, count) - mean) * rstd;
      store_some(y + c * n.channels + i,
                 v * load_some(weight + i, count) + load_some(bias + i, count), count);
    }
}

struct Call {
  const float *x, *gain, *weight, *bias;
  float *m, *y, *scratch;
  Moments *rows;
  float eps_before, eps_after;
};

// Image b, its rows shared by so many threads; working memory from place `first` on.
void one_image(const Call &call, const Sizes &n, int64_t b, int64_t threads, int64_t first) {
  const int64_t H = n.height, row = n.row(), image = H * row;
  const float *from = call.x + b * image;
  float *mixed = call.m + b * image, *to = call.y + b * image, mean, rstd;
  Moments *own = call.rows + b * H;
  const bool shared = threads > 1 && image > 16384;
#pragma omp parallel for schedule(static) num_threads(threads) if (shared)
  for (int64_t r = 0; r < H; ++r) own[r] = moments(from + r * row, row);
  join(own, H, row, call.eps_before, &mean, &rstd);
#pragma omp parallel for schedule(static) num_threads(threads) if (shared)
  for (int64_t r = 0; r < H; ++r) {
    float *down = call.scratch + (first + (shared ? omp_get_thread_num() : 0)) * row;
    mix_row(from, mixed, r, rstd, call.gain, down, n);
    own[r] = moments(mixed + r * row, row);
  }
  join(own, H, row, call.eps_after, &mean, &rstd);
#pragma omp parallel for schedule(static) num_threads(threads) if (shared)
  for (int64_t r = 0; r < H; ++r)
    norm_row(mixed + r * row, to + r * row, mean, rstd, call.weight, call.bias, n);
}

}  // namespace

extern "C" {

// sizes: B, H, W, C, window, threads. x, m, y (B, H, W, C); gain, weight, bias (C).
// scratch: W C numbers a thread; rows: 2 B H doubles, as 4 B H floats.
void pool_norm(const float *x, const float *gain, const float *weight, const float *bias, float *m,
               float *y, float *scratch, float *rows, const int64_t *sizes, float eps_before,
               float eps_after) {
  const Sizes n(sizes);
  const Call call{x, gain, weight, bias, m, y, scratch, reinterpret_cast<Moments *>(rows),
                  eps_before, eps_after};
  // An image a thread if there are enough: it stays in that thread's cache. Else rows are shared;
  // two loops, since threads of a region inside of a region are made anew for every call.
  if (n.batch >= n.threads) {
#pragma omp parallel for schedule(static) num_threads(n.threads) if (n.threads > 1)
    for (int64_t b = 0; b < n.batch; ++b) one_image(call, n, b, 1, omp_get_thread_num());
  } else {
    for (int64_t b = 0; b < n.batch; ++b) one_image(call, n, b, n.threads, 0);
  }
}
}
