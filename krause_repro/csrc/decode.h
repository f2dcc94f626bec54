#pragma once

#include "layout.h"

namespace krause {

// region: decode_query
// Adds D dimensions to e[j], the energy of one query and key j. The keys are transposed: (dim, ld). `next` is prefetched.
template <int S, int D>
KRAUSE_INLINE void accumulate_energies(const float* q, const float* keys, int64_t ld, int64_t n, bool begins, float scale,
                                       const float* next, float* e) {
  for (int64_t j = 0; j < n; j += kLanes) {
    vec acc = begins ? vec{} : load(e + j);
#pragma GCC unroll 8
    for (int d = 0; d < D; ++d) {
      __builtin_prefetch(next + j * D + d * kLanes);
      vec k{};
      if (j + kLanes <= n) k = load(keys + d * ld + j);
      else std::memcpy(&k, keys + d * ld + j, (n - j) * 4);  // avoids reading out of bounds
      const vec difference = k - q[d];
      if (S == kKrause) acc = difference * difference + acc;
      else acc = (S == kKeyNorm ? k * 0.5f - q[d] : broadcast(-q[d])) * k + acc;
    }
    store(e + j, acc * scale);
  }
}
// endregion

// As for_columns, with up to 8 vectors at a time: a single row leaves enough registers.
template <typename F>
KRAUSE_INLINE void for_row_columns(int64_t dim, F f) {
  int64_t d = 0;
  for (; d + 8 * kLanes <= dim; d += 8 * kLanes) f(std::integral_constant<int, 8>(), d);
  for (; d + 4 * kLanes <= dim; d += 4 * kLanes) f(std::integral_constant<int, 4>(), d);
  for (; d + 2 * kLanes <= dim; d += 2 * kLanes) f(std::integral_constant<int, 2>(), d);
  for (; d < dim; d += kLanes) f(std::integral_constant<int, 1>(), d);
}

// out = scale * sum_j w[j] x[j, :] for C vectors of x. Each has 8 / C accumulators, which hide the latency of the FMA.
template <int C>
KRAUSE_INLINE void weighted_sum_row(const float* w, const float* x, int64_t ldx, int64_t n, float scale, float* out) {
  constexpr int kSums = 8 / C;
  vec acc[kSums][C] = {};
  int64_t j = 0;
  for (; j + kSums <= n; j += kSums)
#pragma GCC unroll 8
    for (int s = 0; s < kSums; ++s)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[s][c] = load(x + (j + s) * ldx + c * kLanes) * w[j + s] + acc[s][c];
  for (; j < n; ++j)
    for (int c = 0; c < C; ++c) acc[0][c] = load(x + j * ldx + c * kLanes) * w[j] + acc[0][c];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) {
    for (int s = 1; s < kSums; ++s) acc[0][c] += acc[s][c];
    store(out + c * kLanes, acc[0][c] * scale);
  }
}

// Attention of the last token's query, for all heads of one key head. The keys are transposed.
template <int S>
static void decode_query(const Problem& p, int64_t b, int64_t g) {
  constexpr int kStep = 4;  // dimensions at a time; dim is a multiple of it
  const int64_t low = std::max<int64_t>(0, p.keys - p.window), n = p.keys - low;
  const Buffer e(round_up(n, kLanes));
  const float *keys = p.k.at(b, g, low), *values = p.v.at(b, g, low);
  for (int64_t h = g * (p.heads / p.kv_heads); h < (g + 1) * (p.heads / p.kv_heads); ++h) {
    const float* q = p.q.at(b, h, 0);
    for (int64_t d = 0; d < p.dim; d += kStep) {
      const float scale = S == kKrause && d + kStep >= p.dim ? 0.5f : 1.f;
      accumulate_energies<S, kStep>(q + d, keys + d * p.k.d, p.k.d, n, d == 0, scale, values + d * n, e);
    }
    float z_guess = 0;
    const Row result = softmax_row(e, round_up(n, kLanes), 0, n - 1, nullptr, int32_t(n), p.top_k, kLog2e / p.temperature[h], z_guess);
    p.store_row(p.row(b, h, 0), result);
    float* out = p.out.at(b, h, 0);
    for_row_columns(p.value_dim, [&](auto C, int64_t d) { weighted_sum_row<C()>(e, values + d, p.v.t, n, result.inverse, out + d); });
    p.check_output(out, result.inverse);
  }
}

constexpr int kOutputs = 4, kInputs = kLanes / kOutputs;  // a tile of outputs × rows has one sum per lane

// Lane i of the result is the sum of vector i.
template <int W>
KRAUSE_INLINE vec sum_vectors(vec* v) {
  ivec upper{};
  for (int i = 0; i < kLanes; ++i) upper[i] = i & W ? -1 : 0;
#pragma GCC unroll 8
  for (int i = 0; i < W; ++i) v[i] = (upper ? v[i + W] : v[i]) + xor_lane<W>(upper ? v[i] : v[i + W]);
  if constexpr (W > 1) return sum_vectors<W / 2>(v);
  else return v[0];
}

// region: linear
// Lane r * kOutputs + o is the dot product of row r of x and the o-th of kOutputs weight rows, which lie `apart` floats from each other.
template <int R>
KRAUSE_INLINE vec linear_tile(const float* x, int64_t size, const float* weight, int64_t apart, bool fetch) {
  vec acc[kLanes] = {};
  for (int64_t k = 0; k < size; k += kLanes) {
    vec w[kOutputs];
#pragma GCC unroll 8
    for (int o = 0; o < kOutputs; ++o) {
      w[o] = load(weight + o * apart + k);
      if (fetch) __builtin_prefetch(weight + o * apart + size + k);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vec y = load(x + r * size + k);
#pragma GCC unroll 8
      for (int o = 0; o < kOutputs; ++o) acc[r * kOutputs + o] = y * w[o] + acc[r * kOutputs + o];
    }
  }
  return sum_vectors<kLanes / 2>(acc);
}

// out[r, n] = sum_k x[r, k] weight[n, k] + bias[n], for n = first ... last - 1 in each of the four quarters of the outputs.
static void gemv_rows(const float* x, int64_t rows, int64_t size, const float* weight, const float* bias, int64_t outputs, int64_t first,
                      int64_t last, float* out) {
  const int64_t quarter = outputs / kOutputs;
  for (int64_t n = first; n < last; ++n)
    for (int64_t r = 0; r < rows; r += kInputs)
      for_rows(std::min<int64_t>(kInputs, rows - r), [&](auto R) {
        constexpr int kTileRows = R() < kInputs ? R() : kInputs;
        const vec result = linear_tile<kTileRows>(x + r * size, size, weight + n * size, quarter * size, r == 0);
#pragma GCC unroll 16
        for (int i = 0; i < kTileRows * kOutputs; ++i) {
          const int64_t column = n + i % kOutputs * quarter;
          out[(r + i / kOutputs) * outputs + column] = result[i] + (bias ? bias[column] : 0.f);
        }
      });
}
// endregion

// region: gate
// Rotary position embedding of one head of one token; dim / 2 is a multiple of kLanes.
KRAUSE_INLINE void rotate(const float* x, const float* cosine, const float* sine, int64_t dim, float* out) {
  const int64_t half = dim / 2;
  for (int64_t d = 0; d < half; d += kLanes) {
    const vec a = load(x + d), b = load(x + d + half);
    store(out + d, a * load(cosine + d) - b * load(sine + d));
    store(out + d + half, b * load(cosine + d + half) + a * load(sine + d + half));
  }
}

// out = share * standard + (1 - share) * other with share = softmax(weight [standard, other] + bias)[0]; weight is (2, 2 * width).
KRAUSE_INLINE void gate_token(const float* standard, const float* other, const float* weight, const float* bias, int64_t width,
                              float* out) {
  const float* second = weight + 2 * width;
  vec total{};
  for (int64_t d = 0; d < width; d += kLanes) {
    total += (load(second + d) - load(weight + d)) * load(standard + d);
    total += (load(second + width + d) - load(weight + width + d)) * load(other + d);
  }
  const float logit = sum(total) + bias[1] - bias[0], share = 1 / (1 + std::exp(logit)), rest = 1 / (1 + std::exp(-logit));
  for (int64_t d = 0; d < width; d += kLanes) store(out + d, load(standard + d) * share + load(other + d) * rest);
}
// endregion

}  // namespace krause
