#pragma once

#include "backward.h"

namespace krause {

// The candidates of row i are token[begin[i]] ... token[begin[i + 1] - 1].
struct Lists {
  const int32_t *begin, *token;
};

template <int S>
KRAUSE_INLINE float energy(const float* q, const float* k, int64_t dim) {
  vec total{};
  for (int64_t d = 0; d < dim; d += kLanes) {
    const vec x = load(q + d), y = load(k + d), difference = y - x;
    if (S == kKrause) total = difference * difference + total;
    else total = total - x * y;
    if (S == kKeyNorm) total = y * y * 0.5f + total;
  }
  return S == kKrause ? sum(total) / 2 : sum(total);
}

// region: lists_forward
template <int S>
static void lists_forward(const Problem& p, const Lists& lists, int64_t b, int64_t h) {
  const Buffer e(round_up(p.keys, kLanes));
  const float scale = kLog2e / p.temperature[h];
  float z_guess = 0;
  for (int64_t i = 0; i < p.queries; ++i) {
    const int32_t* token = lists.token + lists.begin[i];
    const int64_t n = lists.begin[i + 1] - lists.begin[i], row = p.row(b, h, i);
    const float* q = p.q.at(b, h, i);
    for (int64_t c = 0; c < n; ++c) e[c] = energy<S>(q, p.k.at(b, h, token[c]), p.dim);
    const Row result = softmax_row(e, round_up(n, kLanes), 0, n - 1, nullptr, int32_t(n), p.top_k, scale, z_guess);
    p.store_row(row, result);
    if (p.dropout > 0)
      for (int64_t c = 0; c < n; c += kLanes) store(e + c, load(e + c) * dropout_scale(row_seed(p.seed, row), c, p.dropout));
    float* out = p.out.at(b, h, i);
    for_columns(p.value_dim, [&](auto C, int64_t d) {
      constexpr int kVectors = C();  // a call in the loop's condition would keep GCC from unrolling it at -O1 and -O2
      vec acc[kVectors] = {};
      for (int64_t k = 0; k < n; ++k) {
        const float* v = p.v.at(b, h, token[k]) + d;
#pragma GCC unroll 8
        for (int c = 0; c < kVectors; ++c) acc[c] = load(v + c * kLanes) * e[k] + acc[c];
      }
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) store(out + d + c * kLanes, acc[c] * result.inverse);
    });
    p.check_output(out, result.inverse);
  }
}
// endregion

template <int S>
static void lists_backward(const Problem& p, const Lists& lists, int64_t b, int64_t h, float* dtemperature) {
  const Buffer e(round_up(p.keys, kLanes)), s(round_up(p.keys, kLanes));
  const float rate = 1 / p.temperature[h], scale = kLog2e * rate;
  double dtau = 0;
  zero_gradients(p, b, h, 0, p.keys);
  for (int64_t i = 0; i < p.queries; ++i) {
    const int32_t* token = lists.token + lists.begin[i];
    const int64_t n = lists.begin[i + 1] - lists.begin[i], row = p.row(b, h, i);
    const float *q = p.q.at(b, h, i), *grad = p.grad.at(b, h, i);
    for (int64_t c = 0; c < n; ++c) {
      e[c] = energy<S>(q, p.k.at(b, h, token[c]), p.dim);
      s[c] = -dot(grad, p.v.at(b, h, token[c]), p.value_dim);
    }
    std::fill(e + n, e + round_up(n, kLanes), kInf);
    std::fill(s + n, s + round_up(n, kLanes), 0.f);
    dtau -= backward_row(p, p.load_row(row), scale, row_seed(p.seed, row), nullptr, 0, round_up(n, kLanes), e, s, nullptr);
    float* dq = p.dq.at(b, h, i);
    std::fill(dq, dq + p.dim, 0.f);
    for (int64_t c = 0; c < n; ++c) {
      const float slope = s[c] * rate, *k = p.k.at(b, h, token[c]);
      float *dk = p.dk.at(b, h, token[c]), *dv = p.dv.at(b, h, token[c]);
      for (int64_t d = 0; d < p.dim; d += kLanes) {
        const vec x = load(q + d), y = load(k + d);
        store(dq + d, load(dq + d) + (S == kKrause ? y - x : y) * slope);
        store(dk + d, load(dk + d) + (S == kSoftmax ? x : x - y) * slope);
      }
      for (int64_t d = 0; d < p.value_dim; d += kLanes) store(dv + d, load(dv + d) + load(grad + d) * e[c]);
    }
  }
  dtemperature[h] = float(dtau * rate * rate);
}

}  // namespace krause
