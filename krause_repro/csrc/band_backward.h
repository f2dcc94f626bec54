#pragma once

#include "backward.h"
#include "band.h"

namespace krause {

// Zeroes one vector on each side of a row's range: transposed_sum reads up to kRows columns beyond it.
KRAUSE_INLINE void clear_edges(float* row, int64_t from, int64_t to, int64_t width) {
  std::fill(row + std::max<int64_t>(0, from - kLanes), row + from, 0.f);
  std::fill(row + to, row + std::min(width, to + kLanes), 0.f);
}

// region: band_backward
// Adds one tile's contribution to dk and dv; weights and slope are (stop - start, width), from key `base` on.
static void add_key_gradients(const Problem& p, const Segment& keys, int64_t b, int64_t g, int64_t h, int64_t start, int64_t stop,
                              const float* weights, const float* slope, int64_t base, int64_t width) {
  const int64_t low = keys.low(p, start), high = keys.high(stop - 1);
  const float rate = 1 / p.temperature[h];
  // the queries of this tile whose window holds any of the keys j ... j + rows - 1
  for (int64_t j = low, to = start; j <= high; j += kRows) {
    const int64_t rows = std::min<int64_t>(kRows, high + 1 - j), from = std::max(start, j - keys.offset);
    while (to < stop && keys.low(p, to) < j + rows) ++to;
    if (from >= to) continue;
    const int64_t at = (from - start) * width + j - base;
    for_rows(rows, [&](auto R) {
      transposed_sum<R()>(weights + at, width, p.grad.at(b, h, from), p.grad.t, to - from, 1, p.dv.at(b, g, j), p.dv.t, p.value_dim);
      transposed_sum<R()>(slope + at, width, p.q.at(b, h, from), p.q.t, to - from, rate, p.dk.at(b, g, j), p.dk.t, p.dim);
    });
  }
}

template <int S>
static void band_backward(const Problem& p, int64_t b, int64_t g, int64_t begin, int64_t end, float* dtemperature) {
  const Segment keys(p, b, g, begin, end);
  const int64_t length = keys.last - keys.first, room = round_up(p.window + kTile, kPanel) + 2 * kPanel;
  const Buffer values(length * p.value_dim), weights(kTile * room), slope(kTile * room), columns(length);
  pack(p.v, b, g, keys.first, keys.last, p.keys, p.value_dim, values);
  for (int64_t h = g * (p.heads / p.kv_heads); h < (g + 1) * (p.heads / p.kv_heads); ++h) {
    const float rate = 1 / p.temperature[h], scale = kLog2e * rate;
    double dtau = 0;
    std::fill(columns.data, columns + length, 0.f);
    float rates[kRows];
    std::fill(rates, rates + kRows, rate);
    for (int64_t start = begin; start < end; start += kTile) {
      const int64_t stop = std::min(end, start + kTile), tile_low = keys.low(p, start), tile_high = keys.high(stop - 1);
      const int64_t base = round_down(tile_low, kPanel), width = round_up(tile_high + 1, kPanel) - base;
      for (int64_t i = start; i < stop; i += kRows) {
        const int64_t rows = std::min<int64_t>(kRows, stop - i), low = keys.low(p, i), high = keys.high(i + rows - 1);
        const int64_t from = round_down(low, kLanes), to = round_up(high + 1, kLanes);
        float *w = weights + (i - start) * width, *s = slope + (i - start) * width;
        for_rows(rows, [&](auto R) {
          for (int64_t c = round_down(low, kPanel); c < round_up(high + 1, kPanel); c += kPanel) {
            const int64_t panel = c - keys.first;
            energies<R(), S>(p.q.at(b, h, i), p.q.t, keys.panels + panel * p.dim, keys.half_norms + panel, p.dim, w + c - base, width);
            energies<R(), kSoftmax>(p.grad.at(b, h, i), p.grad.t, values + panel * p.value_dim, nullptr, p.value_dim, s + c - base, width);
          }
          for (int r = 0; r < R(); ++r) {
            const int64_t row = p.row(b, h, i + r), first = keys.low(p, i + r), last = keys.high(i + r);
            float *we = w + r * width, *se = s + r * width;
            std::fill(we + from - base, we + first - base, kInf);
            std::fill(we + last + 1 - base, we + to - base, kInf);
            dtau -= backward_row(p, p.load_row(row), scale, row_seed(p.seed, row), keys.masked_at(p, from), from, to - from,
                                 we + from - base, se + from - base, columns + (from - keys.first));
            clear_edges(we, from - base, to - base, width);
            clear_edges(se, from - base, to - base, width);
          }
          weighted_sum<R()>(s + (low - base), width, p.k.at(b, g, low), p.k.t, high + 1 - low, rates, p.dq.at(b, h, i), p.dq.t, p.dim);
        });
      }
      add_key_gradients(p, keys, b, g, h, start, stop, weights, slope, base, width);
    }
    dtemperature[h] = float(dtau * rate * rate);
    if (S == kSoftmax) continue;
    for (int64_t j = keys.low(p, begin); j <= keys.high(end - 1); ++j) {
      const float *k = p.k.at(b, g, j), factor = columns[j - keys.first] * rate;
      float* dk = p.dk.at(b, g, j);
      for (int64_t d = 0; d < p.dim; d += kLanes) store(dk + d, load(dk + d) - load(k + d) * factor);
    }
  }
}
// endregion

}  // namespace krause
