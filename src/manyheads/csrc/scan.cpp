// Mamba's selective scan: forward, backward, one token of it or of a whole block.
//
// B batch, H groups, N tokens, D states, V channels a group, T tokens a chunk. 16 channels stand
// in the lanes of a vector, so that a token's B and C are the same number for all of them and a
// state is one multiply-add; decays and states of 16 channels never leave the nearest cache. A
// task is a slice of the channels of one (batch, group); within it the chunks come first and the
// channels second, so that rows are read whole. Only the states at the chunks' borders are kept:
// the backward makes those of a chunk again and walks it in reverse.
//
// Without it: mamba takes five times as long, forward and backward.

#include <omp.h>

#include "gates.h"
#include "rows.h"

namespace {

using namespace manyheads;

struct Rows {  // a (B, H, N, ·) tensor whose last axis is contiguous
  const float *data;
  const int64_t *stride;
  const float *at(int64_t b, int64_t h, int64_t t) const {
    return data + b * stride[0] + h * stride[1] + t * stride[2];
  }
};

struct Out {
  float *data;
  const int64_t *stride;
  float *at(int64_t b, int64_t h, int64_t t) const {
    return data + b * stride[0] + h * stride[1] + t * stride[2];
  }
};

struct Sizes {
  int64_t batch, groups, length, states, channels, chunk, slices, softplus, threads;
  explicit Sizes(const int64_t *s)
      : batch(s[0]), groups(s[1]), length(s[2]), states(s[3]), channels(s[4]), chunk(s[5]),
        slices(s[6]), softplus(s[7]), threads(s[8]) {}
  int64_t blocks() const { return (channels + kLanes - 1) / kLanes; }
  int64_t chunks() const { return (length + chunk - 1) / chunk; }
  int64_t tasks() const { return batch * groups * slices; }
};

struct Inputs {
  Rows q, k, x, delta, z;
  const float *a, *skip, *bias;
  const uint8_t *mask;
};

inline int64_t shorter(int64_t a, int64_t b) { return a < b ? a : b; }

// How far ahead rows are asked for: they lie a page or more apart, which no hardware foresees.
constexpr int64_t kAhead = 8;

inline Floats step_of(const float *row, Floats bias, bool soft, int count) {
  const Floats raw = load_some(row, count) + bias;
  return soft ? softplus(raw) : raw;
}

// The rows d of a (D, V) table at 16 of its channels, to and from a table of vectors.
inline void fetch(Floats *to, const float *from, int64_t states, int64_t channels, int count) {
  for (int64_t d = 0; d < states; ++d) to[d] = load_some(from + d * channels, count);
}

inline void put(float *to, const Floats *from, int64_t states, int64_t channels, int count) {
  for (int64_t d = 0; d < states; ++d) store_some(to + d * channels, from[d], count);
}

template <int kStates>
void forward_block(const Inputs &in, const Sizes &n, int64_t b, int64_t h, int64_t start,
                   int64_t stop, int64_t v, float *carry, const Out &out, Floats *scratch) {
  const int64_t D = kStates ? kStates : n.states;
  const int count = (int)shorter(kLanes, n.channels - v);
  const Floats bias = in.bias ? load_some(in.bias + h * n.channels + v, count) : Floats{};
  const Floats skip = in.skip ? load_some(in.skip + h * n.channels + v, count) : Floats{};
  // Of a size that is known, states stay in registers.
  Floats own[kStates ? 2 * kStates : 1];
  Floats *const rates = kStates ? own : scratch, *const states = rates + D;
  fetch(rates, in.a + h * D * n.channels + v, D, n.channels, count);
  fetch(states, carry, D, n.channels, count);
  for (int64_t t = start; t < stop; ++t) {
    float *to = out.at(b, h, t) + v;
    if (in.mask && !in.mask[b * n.length + t]) {
      store_some(to, Floats{}, count);
      continue;
    }
    if (t + kAhead < n.length) {
      __builtin_prefetch(in.x.at(b, h, t + kAhead) + v);
      __builtin_prefetch(in.delta.at(b, h, t + kAhead) + v);
      if (in.z.data) __builtin_prefetch(in.z.at(b, h, t + kAhead) + v);
    }
    const float *q = in.q.at(b, h, t), *k = in.k.at(b, h, t);
    const Floats x = load_some(in.x.at(b, h, t) + v, count);
    const Floats step = step_of(in.delta.at(b, h, t) + v, bias, n.softplus, count);
    const Floats scaled = step * x, exponent = step * kLog2E;
    Floats y[4] = {};
#pragma GCC unroll 16
    for (int64_t d = 0; d < D; ++d) {
      states[d] = exp2_within(exponent * rates[d]) * states[d] + scaled * k[d];
      y[d & 3] += states[d] * q[d];
    }
    Floats sum = (y[0] + y[1]) + (y[2] + y[3]) + skip * x;
    if (in.z.data) {
      const Floats z = load_some(in.z.at(b, h, t) + v, count);
      sum *= z * logistic(z);
    }
    store_some(to, sum, count);
  }
  put(carry, states, D, n.channels, count);
}

template <int kStates>
void forward_all(const Inputs &in, const Sizes &n, float *memory, float *borders, const Out &out,
                 float *scratch) {
  const int64_t blocks = n.blocks(), size = n.states * n.channels;
#pragma omp parallel for schedule(static) num_threads(n.threads)
  for (int64_t task = 0; task < n.tasks(); ++task) {
    Floats *own = (Floats *)scratch + omp_get_thread_num() * 2 * n.states;
    const int64_t slice = task % n.slices, pair = task / n.slices;
    const int64_t b = pair / n.groups, h = pair % n.groups;
    const int64_t first = slice * blocks / n.slices, last = (slice + 1) * blocks / n.slices;
    for (int64_t chunk = 0; chunk < n.chunks(); ++chunk) {
      const int64_t start = chunk * n.chunk, stop = shorter(start + n.chunk, n.length);
      for (int64_t block = first; block < last; ++block) {
        const int64_t v = block * kLanes;
        float *carry = memory + pair * size + v;
        if (borders) {
          const int count = (int)shorter(kLanes, n.channels - v);
          float *border = borders + (chunk * n.batch * n.groups + pair) * size + v;
          for (int64_t d = 0; d < n.states; ++d)
            store_some(border + d * n.channels, load_some(carry + d * n.channels, count), count);
        }
        forward_block<kStates>(in, n, b, h, start, stop, v, carry, out, own);
      }
    }
  }
}

struct Gradients {
  Rows out;
  Out q, k, x, delta, z;      // q and k: one (B, H, N, D) a slice
  float *a, *skip, *bias;     // (B, H, D, V), (B, H, V), (B, H, V), zeros at first
  int64_t q_slice, k_slice;   // numbers between the slices of q and of k
};

struct Scratch {  // of one thread: (T + 1, D) states; (T, D) decays, dq, dk; 2 (T); 3 (D)
  Floats *states, *decays, *dq, *dk, *steps, *read, *fixed;
  Scratch(Floats *from, int64_t T, int64_t D)
      : states(from), decays(states + (T + 1) * D), dq(decays + T * D), dk(dq + T * D),
        steps(dk + T * D), read(steps + T), fixed(read + T) {}
  static int64_t size(int64_t T, int64_t D) { return (4 * T + 4) * D + 2 * T; }
};

template <int kStates>
void backward_block(const Inputs &in, const Sizes &n, int64_t b, int64_t h, int64_t start,
                    int64_t stop, int64_t v, const float *border, float *carry,
                    const Gradients &grad, const Scratch &s) {
  const int64_t D = kStates ? kStates : n.states, V = n.channels;
  const int count = (int)shorter(kLanes, V - v);
  const Floats bias = in.bias ? load_some(in.bias + h * V + v, count) : Floats{};
  const Floats skip = in.skip ? load_some(in.skip + h * V + v, count) : Floats{};
  const int64_t pair = b * n.groups + h;
  float *grad_a = grad.a + pair * D * V + v;
  Floats own[kStates ? 3 * kStates : 1];
  Floats *const rates = kStates ? own : s.fixed, *const g = rates + D, *const da = g + D;
  fetch(rates, in.a + h * D * V + v, D, V, count);
  fetch(s.states, border, D, V, count);

  for (int64_t t = start, i = 0; t < stop; ++t, ++i) {
    Floats *now = s.states + (i + 1) * D, *decays = s.decays + i * D;
    const Floats *before = now - D;
    if (in.mask && !in.mask[b * n.length + t]) {
      for (int64_t d = 0; d < D; ++d) now[d] = before[d];
      continue;
    }
    if (t + kAhead < n.length) {
      __builtin_prefetch(in.x.at(b, h, t + kAhead) + v);
      __builtin_prefetch(in.delta.at(b, h, t + kAhead) + v);
      __builtin_prefetch(grad.out.at(b, h, t + kAhead) + v);
      if (in.z.data) __builtin_prefetch(in.z.at(b, h, t + kAhead) + v);
    }
    const float *q = in.q.at(b, h, t), *k = in.k.at(b, h, t);
    const Floats x = load_some(in.x.at(b, h, t) + v, count);
    const Floats step = step_of(in.delta.at(b, h, t) + v, bias, n.softplus, count);
    const Floats scaled = step * x, exponent = step * kLog2E;
    s.steps[i] = step;
    Floats y[4] = {};
#pragma GCC unroll 16
    for (int64_t d = 0; d < D; ++d) {
      decays[d] = exp2_within(exponent * rates[d]);
      now[d] = decays[d] * before[d] + scaled * k[d];
      y[d & 3] += now[d] * q[d];
    }
    s.read[i] = (y[0] + y[1]) + (y[2] + y[3]) + skip * x;
  }

  fetch(g, carry, D, V, count);
  fetch(da, grad_a, D, V, count);
  Floats grad_skip = {}, grad_bias = {};
  for (int64_t t = stop - 1, i = stop - start - 1; t >= start; --t, --i) {
    if (in.mask && !in.mask[b * n.length + t]) {
      store_some(grad.x.at(b, h, t) + v, Floats{}, count);
      store_some(grad.delta.at(b, h, t) + v, Floats{}, count);
      if (in.z.data) store_some(grad.z.at(b, h, t) + v, Floats{}, count);
      continue;
    }
    const float *q = in.q.at(b, h, t), *k = in.k.at(b, h, t);
    const Floats x = load_some(in.x.at(b, h, t) + v, count), step = s.steps[i];
    const Floats scaled = step * x;
    Floats dy = load_some(grad.out.at(b, h, t) + v, count);
    if (in.z.data) {
      const Floats z = load_some(in.z.at(b, h, t) + v, count), open = logistic(z);
      const Floats dz = dy * s.read[i] * open * (1.0f + z * (1.0f - open));
      store_some(grad.z.at(b, h, t) + v, dz, count);
      dy *= z * open;
    }
    const Floats *now = s.states + (i + 1) * D, *before = now - D, *decays = s.decays + i * D;
    Floats *dq = s.dq + i * D, *dk = s.dk + i * D;
    Floats dscaled[2] = {}, dstep[2] = {};
#pragma GCC unroll 16
    for (int64_t d = 0; d < D; ++d) {
      const Floats whole = g[d] + dy * q[d];
      dq[d] += now[d] * dy;
      dk[d] += whole * scaled;
      dscaled[d & 1] += whole * k[d];
      g[d] = whole * decays[d];
      const Floats rate = g[d] * before[d];
      dstep[d & 1] += rate * rates[d];
      da[d] += rate * step;
    }
    const Floats both = dscaled[0] + dscaled[1];
    Floats draw = dstep[0] + dstep[1] + both * x;
    if (n.softplus) draw *= logistic(load_some(in.delta.at(b, h, t) + v, count) + bias);
    store_some(grad.x.at(b, h, t) + v, both * step + dy * skip, count);
    store_some(grad.delta.at(b, h, t) + v, draw, count);
    grad_skip += dy * x;
    grad_bias += draw;
  }
  put(carry, g, D, V, count);
  put(grad_a, da, D, V, count);
  float *to = grad.skip + pair * V + v;
  store_some(to, load_some(to, count) + grad_skip, count);
  to = grad.bias + pair * V + v;
  store_some(to, load_some(to, count) + grad_bias, count);
}

template <int kStates>
void backward_all(const Inputs &in, const Sizes &n, const float *borders, float *carry,
                  const Gradients &grad, float *scratch) {
  const int64_t blocks = n.blocks(), D = n.states, size = D * n.channels;
#pragma omp parallel for schedule(static) num_threads(n.threads)
  for (int64_t task = 0; task < n.tasks(); ++task) {
    const int64_t own = omp_get_thread_num() * Scratch::size(n.chunk, D);
    const Scratch s((Floats *)scratch + own, n.chunk, D);
    const int64_t slice = task % n.slices, pair = task / n.slices;
    const int64_t b = pair / n.groups, h = pair % n.groups;
    const int64_t first = slice * blocks / n.slices, last = (slice + 1) * blocks / n.slices;
    for (int64_t chunk = n.chunks() - 1; chunk >= 0; --chunk) {
      const int64_t start = chunk * n.chunk, stop = shorter(start + n.chunk, n.length);
      for (int64_t i = 0; i < (stop - start) * D; ++i) s.dq[i] = s.dk[i] = Floats{};
      for (int64_t block = first; block < last; ++block) {
        const int64_t v = block * kLanes;
        const float *border = borders + (chunk * n.batch * n.groups + pair) * size + v;
        backward_block<kStates>(in, n, b, h, start, stop, v, border, carry + pair * size + v,
                                grad, s);
      }
      for (int64_t t = start, i = 0; t < stop; ++t) {
        float *dq = grad.q.at(b, h, t) + slice * grad.q_slice;
        float *dk = grad.k.at(b, h, t) + slice * grad.k_slice;
        for (int64_t d = 0; d < D; ++d, ++i) dq[d] = sum(s.dq[i]), dk[d] = sum(s.dk[i]);
      }
    }
  }
}

Inputs inputs(const float *q, const float *k, const float *x, const float *delta, const float *z,
              const float *a, const float *skip, const float *bias, const uint8_t *mask,
              const int64_t *strides) {
  return {{q, strides},      {k, strides + 3},  {x, strides + 6}, {delta, strides + 9},
          {z, strides + 12}, a, skip, bias, mask};
}

}  // namespace

extern "C" {

// sizes: B, H, N, D, V, chunk, slices, softplus, threads. strides: of batch, group and token, for
// q, k, x, delta, z, out in turn. a: (H, D, V). memory (B, H, D, V): the first, becomes the last.
// borders (chunks, B, H, D, V) or null. z, skip, bias and mask may be null. scratch: 32 D numbers
// a thread, at an address that 64 divides.
void scan_forward(const float *q, const float *k, const float *x, const float *delta,
                  const float *z, const float *a, const float *skip, const float *bias,
                  const uint8_t *mask, float *memory, float *borders, float *out,
                  float *scratch, const int64_t *sizes, const int64_t *strides) {
  const Sizes n(sizes);
  const Inputs in = inputs(q, k, x, delta, z, a, skip, bias, mask, strides);
  const Out to{out, strides + 15};
  auto *run = n.states == 16 ? forward_all<16> : n.states == 8 ? forward_all<8> : forward_all<0>;
  run(in, n, memory, borders, to, scratch);
}

// strides: those of the forward's five inputs, then of grad_out, dq, dk, dx, ddelta, dz.
// carry (B, H, D, V): the gradient of the last memory, becomes that of the first.
// dq, dk: (slices, B, H, N, D), a part of the sum in each. da (B, H, D, V), dskip and dbias
// (B, H, V): zeros, added to. scratch: 16 ((4 T + 4) D + 2 T) numbers a thread.
void scan_backward(const float *q, const float *k, const float *x, const float *delta,
                   const float *z, const float *a, const float *skip, const float *bias,
                   const uint8_t *mask, const float *borders, const float *grad_out, float *carry,
                   float *dq, float *dk, float *dx, float *ddelta, float *dz, float *da,
                   float *dskip, float *dbias, float *scratch, const int64_t *sizes,
                   const int64_t *strides) {
  const Sizes n(sizes);
  const Inputs in = inputs(q, k, x, delta, z, a, skip, bias, mask, strides);
  const int64_t *s = strides + 15;
  const int64_t slice = n.batch * n.groups * n.length * n.states;
  const Gradients grad{{grad_out, s}, {dq, s + 3},  {dk, s + 6}, {dx, s + 9}, {ddelta, s + 12},
                       {dz, s + 15},  da, dskip, dbias, slice, slice};
  auto *run =
      n.states == 16 ? backward_all<16> : n.states == 8 ? backward_all<8> : backward_all<0>;
  run(in, n, borders, carry, grad, scratch);
}

// One token. q, k (B, H, D); x, delta, z (B, H, V), with the strides of batch and group in turn;
// a (H, V, D), skip and bias (H, V); memory and next (B, H, V, D), may be the same; out (B, H, V).
// sizes: B, H, D, V, softplus, threads.
void scan_step(const float *q, const float *k, const float *x, const float *delta, const float *z,
               const float *a, const float *skip, const float *bias, const float *memory,
               float *next, float *out, const int64_t *sizes, const int64_t *strides) {
  const int64_t H = sizes[1], D = sizes[2], V = sizes[3], blocks = (V + kLanes - 1) / kLanes;
  const int64_t tasks = sizes[0] * H * blocks;
  // A few microseconds of work are not worth waking threads for.
  const bool many = tasks * kLanes * D > 65536;
#pragma omp parallel for schedule(static) num_threads(sizes[5]) if (many)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t pair = task / blocks, v = task % blocks * kLanes, b = pair / H, h = pair % H;
    const int count = (int)shorter(kLanes, V - v);
    auto row = [&](const float *from, int tensor) {
      return from + b * strides[2 * tensor] + h * strides[2 * tensor + 1];
    };
    const float *query = row(q, 0), *key = row(k, 1);
    const Floats input = load_some(row(x, 2) + v, count);
    const Floats low = bias ? load_some(bias + h * V + v, count) : Floats{};
    const Floats step = step_of(row(delta, 3) + v, low, sizes[4], count);
    const Floats scaled = step * input, exponent = step * kLog2E;
    Floats y = {};
    for (int c = 0; c < count; ++c) {  // here the states of a channel are the lanes
      const float *rates = a + (h * V + v + c) * D, *from = memory + (pair * V + v + c) * D;
      float *to = next + (pair * V + v + c) * D;
      Floats read = {};
      for (int64_t d = 0; d < D; d += kLanes) {
        const int some = (int)shorter(kLanes, D - d);
        const Floats state = exp2_within(exponent[c] * load_some(rates + d, some)) *
                                 load_some(from + d, some) +
                             scaled[c] * load_some(key + d, some);
        store_some(to + d, state, some);
        read += state * load_some(query + d, some);
      }
      y[c] = sum(read);
    }
    if (skip) y += load_some(skip + h * V + v, count) * input;
    if (z) {
      const Floats gate = load_some(row(z, 4) + v, count);
      y *= gate * logistic(gate);
    }
    store_some(out + pair * V + v, y, count);
  }
}

// One token through a whole block. x (B, C); weights (O, K) of in_proj, x_proj, dt_proj, out_proj;
// taps (E, W); biases of in_proj, convolution and out_proj or null; a_log (E, D), skip (E); window
// (B, W, E), newest last, and memory (B, E, D), whose next ones are written; out (B, C); scratch
// B (5 E + R + 2 G D). sizes: B, C, E, G, D, R, W, threads.
void scan_block_step(const float *x, const float *in_weight, const float *in_bias,
                     const float *taps, const float *conv_bias, const float *x_weight,
                     const float *dt_weight, const float *dt_bias, const float *a_log,
                     const float *skip, const float *out_weight, const float *out_bias,
                     const float *window, const float *memory, float *next_window,
                     float *next_memory, float *out, float *scratch, const int64_t *sizes) {
  const int64_t B = sizes[0], C = sizes[1], E = sizes[2], G = sizes[3], D = sizes[4], R = sizes[5];
  const int64_t W = sizes[6], V = E / G, low_width = R + 2 * G * D;
  float *xz = scratch, *u = xz + B * 2 * E, *delta = u + B * E, *y = delta + B * E;
  float *low = y + B * E;
  const FewRows in = {x, in_weight, in_bias, xz, B, C, 2 * E, C};
  const FewRows mix = {u, x_weight, nullptr, low, B, E, low_width, E};
  const FewRows widen = {low, dt_weight, dt_bias, delta, B, R, E, low_width};
  const FewRows back = {y, out_weight, out_bias, out, B, E, C, E};
  const int64_t blocks = (E + kLanes - 1) / kLanes;
#pragma omp parallel num_threads(sizes[7])
  {
    const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t first = blocks * me / team, last = blocks * (me + 1) / team;
    row_share(in, me, team);
#pragma omp barrier
    for (int64_t b = 0; b < B; ++b)
      for (int64_t e = first * kLanes; e < last * kLanes && e < E; e += kLanes) {
        const int count = (int)shorter(kLanes, E - e);
        const float *before = window + b * W * E + e;
        float *after = next_window + b * W * E + e;
        Floats sums = conv_bias ? load_some(conv_bias + e, count) : Floats{};
        for (int64_t j = 0; j < W; ++j) {
          const Floats seen =
              load_some(j + 1 < W ? before + (j + 1) * E : xz + b * 2 * E + e, count);
          Floats tap = {};
          for (int c = 0; c < count; ++c) tap[c] = taps[(e + c) * W + j];
          sums += tap * seen;
          store_some(after + j * E, seen, count);
        }
        store_some(u + b * E + e, sums * logistic(sums), count);
      }
#pragma omp barrier
    row_share(mix, me, team);
#pragma omp barrier
    row_share(widen, me, team);
#pragma omp barrier
    for (int64_t b = 0; b < B; ++b)
      for (int64_t e = first * kLanes; e < last * kLanes && e < E; e += kLanes) {
        const int count = (int)shorter(kLanes, E - e);
        const Floats input = load_some(u + b * E + e, count);
        const Floats step = softplus(load_some(delta + b * E + e, count));
        const Floats scaled = step * input, exponent = step * -kLog2E;
        Floats read = {};
        for (int c = 0; c < count; ++c) {  // here the states of a channel are the lanes
          const float *key = low + b * low_width + R + (e + c) / V * D, *query = key + G * D;
          const int64_t at = (b * E + e + c) * D;
          Floats sums = {};
          for (int64_t d = 0; d < D; d += kLanes) {
            const int some = (int)shorter(kLanes, D - d);
            const Floats rate = exp(load_some(a_log + (e + c) * D + d, some));
            const Floats state =
                exp2_within(exponent[c] * rate) * load_some(memory + at + d, some) +
                scaled[c] * load_some(key + d, some);
            store_some(next_memory + at + d, state, some);
            sums += state * load_some(query + d, some);
          }
          read[c] = sum(sums);
        }
        const Floats gate = load_some(xz + b * 2 * E + E + e, count);
        read += load_some(skip + e, count) * input;
        store_some(y + b * E + e, read * gate * logistic(gate), count);
      }
#pragma omp barrier
    row_share(back, me, team);
  }
}
}
