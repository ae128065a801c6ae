// Products of 8-bit matrices with 32-bit sums, and the parts of an 8-bit Mamba block.
//
// B batch, N tokens, E channels, G groups, D states, V = E / G, W taps, R width of the step.
// Codes are int8, values are code times scale; what is not a product of codes (SiLU, softplus,
// exponentials, the states) is float32. Halves are rounded away from zero.
//
// Without it: PyTorch multiplies 8-bit matrices, and does the rest in several passes, slower; an
// 8-bit Mamba saves memory but no time.

#include <omp.h>

#include "int8_linear.h"

namespace {

using namespace manyheads;

// 16 channels of one token of the convolution, its taps' rows given.
inline Bytes taps_of(const int8_t *const *rows, const int8_t *weight, const float *bias,
                     int64_t taps, int64_t channels, int64_t c, int count, float in, float out) {
  Ints sum = {};
  for (int64_t j = 0; j < taps; ++j)
    sum += widen(load_bytes(weight + j * channels + c, count)) *
           widen(load_bytes(rows[j] + c, count));
  Floats y = real(sum) * in + (bias ? load_some(bias + c, count) : Floats{});
  y *= logistic(y);
  return encode(y / out);
}

struct Scan {
  const int8_t *u, *dt, *low, *z;
  const float *a, *skip, *bias;
  const uint8_t *mask;
  float *memory, *out;
  const float *scales;
  const int64_t *sizes, *strides;
};

// 16 channels of group g from v on, all tokens. scratch: 2 D vectors, then B and C of a token.
template <int kStates>
void scan_block(const Scan &n, int64_t b, int64_t g, int64_t v, Floats *scratch) {
  const int64_t N = n.sizes[1], E = n.sizes[2], G = n.sizes[3], R = n.sizes[5], V = E / G;
  const int64_t D = kStates ? kStates : n.sizes[4], row = R + 2 * G * D, e = g * V + v;
  const int count = width(v, V);
  float *memory = n.memory + (b * G + g) * D * V + v;
  float *key = (float *)(scratch + 2 * D), *query = key + D;
  // Of a size that is known, states stay in registers.
  Floats own[kStates ? 2 * kStates : 1];
  Floats *const rates = kStates ? own : scratch, *const states = rates + D;
  for (int64_t d = 0; d < D; ++d) {
    rates[d] = load_some(n.a + (g * D + d) * V + v, count);
    states[d] = load_some(memory + d * V, count);
  }
  const Floats shift = load_some(n.bias + e, count), through = load_some(n.skip + e, count);
  for (int64_t t = 0; t < N; ++t) {
    const int64_t token = b * N + t;
    float *to = n.out + token * E + e;
    if (n.mask && !n.mask[token]) {
      store_some(to, Floats{}, count);
      continue;
    }
    const int8_t *shared = n.low + token * row + R + g * D;
    decode_row(shared, n.scales[2], key, D);
    decode_row(shared + G * D, n.scales[2], query, D);
    const Floats x = load_real(n.u + token * E + e, count) * n.scales[0];
    const Floats step = softplus(load_real(n.dt + token * E + e, count) * n.scales[1] + shift);
    const Floats scaled = step * x, exponent = step * kLog2E;
    Floats y[4] = {through * x};
#pragma GCC unroll 16
    for (int64_t d = 0; d < D; ++d) {
      states[d] = exp2_within(exponent * rates[d]) * states[d] + scaled * key[d];
      y[d & 3] += states[d] * query[d];
    }
    const int8_t *gates = n.z + b * n.strides[0] + t * n.strides[1] + e;
    const Floats gate = load_real(gates, count) * n.scales[3];
    store_some(to, ((y[0] + y[1]) + (y[2] + y[3])) * gate * logistic(gate), count);
  }
  for (int64_t d = 0; d < D; ++d) store_some(memory + d * V, states[d], count);
}

}  // namespace

extern "C" {

// out or codes: (M, O), the other null. sizes: M, K, O, bytes between rows of x, whether scale is
// (O), threads.
void int8_linear(const int8_t *x, const int8_t *weight, const float *scale, const float *bias,
                 const float *row_scale, const int32_t *offset, float *out, int8_t *codes,
                 const int64_t *sizes) {
  const Linear n{weight, scale, bias, row_scale, offset, sizes[1], sizes[2], sizes[4]};
  const auto totals = totals_of(x, sizes[3], sizes[0], sizes[1]);
  linear(n, x, sizes[3], sizes[0], totals.data(), out, codes, sizes[5]);
}

// What int8_linear makes of its sums (M, O). sizes: M, O, whether scale is (O), threads.
void int8_finish(const int32_t *sums, const float *scale, const float *bias,
                 const float *row_scale, const int32_t *offset, float *out, int8_t *codes,
                 const int64_t *sizes) {
  const Linear n{nullptr, scale, bias, row_scale, offset, 0, sizes[1], sizes[2]};
  const bool many = sizes[0] * sizes[1] > 65536;
#pragma omp parallel for schedule(static) num_threads(sizes[3]) if (many)
  for (int64_t m = 0; m < sizes[0]; ++m)
    for (int64_t o = 0; o < sizes[1]; o += kLanes) {
      const Finish finish(n, o);
      finish(n, m, load_ints(sums + m * sizes[1] + o, finish.count), out, codes);
    }
}

// x (M, K) to codes, halves to even: with scale and zero, of one number each, or, where both are
// null, with each row's own scale, which goes to row_scale (M). sizes: M, K, threads.
void int8_encode_rows(const float *x, int8_t *codes, const float *scale, const int32_t *zero,
                      float *row_scale, const int64_t *sizes) {
  encode_rows(x, codes, scale, zero, row_scale, sizes[0], sizes[1], sizes[2]);
}

// Both in one: x (M, K) to out (M, O). sizes: M, K, O, whether scale is (O), threads.
void int8_float_linear(const float *x, const int8_t *weight, const float *scale, const float *bias,
                       const float *input_scale, const int32_t *input_zero, const int32_t *offset,
                       float *out, const int64_t *sizes) {
  const int64_t M = sizes[0], K = sizes[1];
  std::vector<int8_t> codes(M * K);
  std::vector<float> own(M);
  encode_rows(x, codes.data(), input_scale, input_zero, own.data(), M, K, sizes[4]);
  const Linear n{weight, scale, bias, input_scale ? nullptr : own.data(), offset, K, sizes[2],
                 sizes[3]};
  const auto totals = totals_of(codes.data(), K, M, K);
  linear(n, codes.data(), K, M, totals.data(), out, nullptr, sizes[4]);
}

// sizes: numbers, threads.
void int8_encode(const float *x, int8_t *codes, const float *scale, const int64_t *sizes) {
  constexpr int64_t kPart = 4096;
  const int64_t parts = (sizes[0] + kPart - 1) / kPart;
#pragma omp parallel for schedule(static) num_threads(sizes[1]) if (parts > 16)
  for (int64_t p = 0; p < parts; ++p) {
    const int64_t at = p * kPart, rest = sizes[0] - at;
    encode_row(x + at, codes + at, rest < kPart ? rest : kPart, scale[0]);
  }
}

// x (B, N, E) with strides of batch and token, before (B, W - 1, E), weight (W, E), bias (E) or
// null, codes (B, N, E). scales: of input times weight, of output. sizes: B, N, E, W, threads.
void int8_conv(const int8_t *x, const int8_t *before, const int8_t *weight, const float *bias,
               const float *scales, int8_t *codes, const int64_t *sizes, const int64_t *strides) {
  const int64_t N = sizes[1], E = sizes[2], W = sizes[3], tokens = sizes[0] * N;
#pragma omp parallel num_threads(sizes[4]) if (tokens * E > 65536)
  {
    std::vector<const int8_t *> rows(W);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tokens; ++i) {
      const int64_t b = i / N, t = i % N;
      for (int64_t j = 0; j < W; ++j) {
        const int64_t s = t - W + 1 + j;
        rows[j] = s >= 0 ? x + b * strides[0] + s * strides[1]
                         : before + (b * (W - 1) + s + W - 1) * E;
      }
      for (int64_t c = 0; c < E; c += kLanes) {
        const int count = width(c, E);
        store_bytes(codes + i * E + c,
                    taps_of(rows.data(), weight, bias, W, E, c, count, scales[0], scales[1]), count);
      }
    }
  }
}

// u, dt (B, N, E); low (B, N, R + 2 G D), of which B and C are read; z (B, N, E) with strides of
// batch and token; a (G, D, V), skip, bias (E); mask (B, N) or null; memory (B, G, D, V), becomes
// the last; out (B, N, E). scales: of u, dt, low, z. sizes: B, N, E, G, D, R, threads.
void int8_scan(const int8_t *u, const int8_t *dt, const int8_t *low, const int8_t *z,
               const float *a, const float *skip, const float *bias, const uint8_t *mask,
               float *memory, float *out, const float *scales, const int64_t *sizes,
               const int64_t *strides) {
  const Scan n{u, dt, low, z, a, skip, bias, mask, memory, out, scales, sizes, strides};
  const int64_t blocks = (sizes[2] / sizes[3] + kLanes - 1) / kLanes, D = sizes[4];
  const int64_t tasks = sizes[0] * sizes[3] * blocks;
  auto *run = D == 16 ? scan_block<16> : D == 8 ? scan_block<8> : scan_block<0>;
#pragma omp parallel num_threads(sizes[6]) if (tasks > 1 && sizes[1] * sizes[2] * D > 65536)
  {
    std::vector<char> room((2 * D + 1) * sizeof(Floats) + 2 * D * sizeof(float));
    auto *scratch = (Floats *)(((uintptr_t)room.data() + sizeof(Floats) - 1) / sizeof(Floats) *
                               sizeof(Floats));
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task)
      run(n, task / blocks / sizes[3], task / blocks % sizes[3], task % blocks * kLanes, scratch);
  }
}

// y (M, n = base · fast) to the codes of its rotation times `factor`; matrix (base, base), or null.
// sizes: M, base, fast, threads.
void int8_rotate(const float *y, const float *matrix, const float *factor, int8_t *codes,
                 const int64_t *sizes) {
  const int64_t n = sizes[1] * sizes[2];
#pragma omp parallel num_threads(sizes[3]) if (sizes[0] * n > 32768)
  {
    std::vector<float> row(n), other(n);
#pragma omp for schedule(static)
    for (int64_t m = 0; m < sizes[0]; ++m) {
      std::memcpy(row.data(), y + m * n, n * sizeof(float));
      rotate(row.data(), other.data(), matrix, sizes[1], sizes[2]);
      for (int64_t c = 0; c < n; c += kLanes) {
        const int count = width(c, n);
        store_bytes(codes + m * n + c, encode(load_some(row.data() + c, count) * factor[0]), count);
      }
    }
  }
}

// One token through a whole block. x (B, C); weights (O, K) each, conv (W, E); conv_bias, dt_bias,
// skip (E), in_bias, out_bias or null; a (E, D); window (B, W, E) codes, newest last, and memory
// (B, E, D), both become the next; out (B, C). scales: of the input, in_proj, conv's product, u,
// x_proj, dt_proj, dt, low, z, rotation, out_proj. sizes: B, C, E, G, D, R, W, base, fast, threads;
// base 0: no rotation.
void int8_mamba_step(const float *x, const int8_t *in_weight, const float *in_bias,
                     const int8_t *conv, const float *conv_bias, const int8_t *x_weight,
                     const int8_t *dt_weight, const float *dt_bias, const float *a,
                     const float *skip, const float *matrix, const int8_t *out_weight,
                     const float *out_bias, int8_t *window, float *memory, float *out,
                     const float *scales, const int64_t *sizes) {
  const int64_t C = sizes[1], E = sizes[2], G = sizes[3], D = sizes[4], R = sizes[5], W = sizes[6];
  const int64_t V = E / G, low_width = R + 2 * G * D, threads = sizes[9];
  std::vector<int8_t> in(C), xz(2 * E), u(E), low(low_width), dt(E), codes(E);
  std::vector<float> y(E), other(E), key(G * D), query(G * D);
  std::vector<const int8_t *> rows(W);
  for (int64_t b = 0; b < sizes[0]; ++b) {
    encode_row(x + b * C, in.data(), C, scales[0]);
    one_row(in_weight, scales + 1, in_bias, C, 2 * E, in.data(), nullptr, xz.data(), threads);
    int8_t *seen = window + b * W * E;
    std::memmove(seen, seen + E, (W - 1) * E);
    std::memcpy(seen + (W - 1) * E, xz.data(), E);
    for (int64_t j = 0; j < W; ++j) rows[j] = seen + j * E;
    for (int64_t c = 0; c < E; c += kLanes) {
      const int count = width(c, E);
      const Bytes v = taps_of(rows.data(), conv, conv_bias, W, E, c, count, scales[2], scales[3]);
      store_bytes(u.data() + c, v, count);
    }
    one_row(x_weight, scales + 4, nullptr, E, low_width, u.data(), nullptr, low.data(), threads);
    one_row(dt_weight, scales + 5, nullptr, R, E, low.data(), nullptr, dt.data(), threads);
    decode_row(low.data() + R, scales[7], key.data(), G * D);
    decode_row(low.data() + R + G * D, scales[7], query.data(), G * D);
    for (int64_t e = 0; e < E; e += kLanes) {
      const int count = width(e, E);
      const Floats input = load_real(u.data() + e, count) * scales[3];
      const Floats step =
          softplus(load_real(dt.data() + e, count) * scales[6] + load_some(dt_bias + e, count));
      const Floats scaled = step * input, exponent = step * kLog2E;
      Floats sum_ = {};
      for (int c = 0; c < count; ++c) {  // here the states of a channel are the lanes
        const int64_t g = (e + c) / V * D;
        float *state = memory + (b * E + e + c) * D;
        Floats read = {};
        for (int64_t d = 0; d < D; d += kLanes) {
          const int some = width(d, D);
          const Floats next =
              exp2_within(exponent[c] * load_some(a + (e + c) * D + d, some)) *
                  load_some(state + d, some) +
              scaled[c] * load_some(key.data() + g + d, some);
          store_some(state + d, next, some);
          read += next * load_some(query.data() + g + d, some);
        }
        sum_[c] = sum(read);
      }
      const Floats gate = load_real(xz.data() + E + e, count) * scales[8];
      sum_ += load_some(skip + e, count) * input;
      store_some(y.data() + e, sum_ * gate * logistic(gate), count);
    }
    if (sizes[7]) rotate(y.data(), other.data(), matrix, sizes[7], sizes[8]);
    for (int64_t c = 0; c < E; c += kLanes) {
      const int count = width(c, E);
      const Floats v = load_some(y.data() + c, count);
      // With a rotation its factor is multiplied by, as where many tokens are rotated.
      store_bytes(codes.data() + c, encode(sizes[7] ? v * scales[9] : v / scales[9]), count);
    }
    one_row(out_weight, scales + 10, out_bias, E, C, codes.data(), out + b * C, nullptr, threads);
  }
}
}
