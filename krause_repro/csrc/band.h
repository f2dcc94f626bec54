#pragma once

#include "layout.h"

namespace krause {

// The keys that one segment of queries needs: its own and a window before.
struct Segment {
  int64_t offset;         // query i is token i + offset
  const int32_t* starts;  // of this batch: where the sequence of each token starts, if several share a row; else null
  int64_t first, last;    // keys first ... last - 1 are packed
  Buffer panels, half_norms, masked;
  std::vector<int32_t> allowed_before;  // allowed_before[j]: number of unmasked keys in first ... first + j - 1

  Segment(const Problem& p, int64_t b, int64_t g, int64_t begin, int64_t end)
      : offset(p.keys - p.queries),
        starts(p.starts ? p.starts + b * p.keys : nullptr),
        first(round_down(low(p, begin), kPanel)),
        last(round_up(end + offset, kPanel)),
        panels((last - first) * p.dim),
        half_norms(p.score == kKeyNorm ? last - first : 0),
        masked(p.mask ? last - first : 0) {
    pack(p.k, b, g, first, last, p.keys, p.dim, panels);
    if (p.score == kKeyNorm)
      for (int64_t j = 0; j < last - first; ++j) {
        const float* key = panels + round_down(j, kPanel) * p.dim + j % kPanel;
        float square = 0;
        for (int64_t d = 0; d < p.dim; ++d) square += key[d * kPanel] * key[d * kPanel];
        half_norms[j] = square / 2;
      }
    if (!p.mask) return;
    allowed_before.assign(last - first + 1, 0);
    for (int64_t j = first; j < last; ++j) {
      const bool is_allowed = j < p.keys && p.mask[b * p.keys + j];
      masked[j - first] = is_allowed ? 0.f : 1.f;
      allowed_before[j - first + 1] = allowed_before[j - first] + is_allowed;
    }
  }
  int64_t low(const Problem& p, int64_t i) const {
    return std::max<int64_t>(starts ? starts[i + offset] : 0, i + offset - p.window + 1);
  }
  int64_t high(int64_t i) const { return i + offset; }
  const float* masked_at(const Problem& p, int64_t j) const { return p.mask ? masked + (j - first) : nullptr; }
  int32_t num_allowed(const Problem& p, int64_t low, int64_t high) const {
    return p.mask ? allowed_before[high + 1 - first] - allowed_before[low - first] : int32_t(high - low + 1);
  }
};

// Calls f(C, extra): scores C vectors of a panel, starting `extra` columns early. Partial row blocks always take the whole panel.
template <int R, typename F>
KRAUSE_INLINE void for_vectors(int64_t vectors, int64_t skipped, F f) {
  if (R < kRows || vectors >= kColumns) return f(std::integral_constant<int, kColumns>(), skipped);
  if (vectors == 1) return f(std::integral_constant<int, 1>(), 0);
  if (vectors == 2) return f(std::integral_constant<int, 2>(), 0);
  f(std::integral_constant<int, (kColumns < 3 ? kColumns : 3)>(), 0);
}

// region: band_forward
template <int S>
static void band_forward(const Problem& p, int64_t b, int64_t g, int64_t begin, int64_t end) {
  const Segment keys(p, b, g, begin, end);
  const Buffer buffer(kRows * (round_up(p.window + kRows, kPanel) + 2 * kPanel));
  for (int64_t h = g * (p.heads / p.kv_heads); h < (g + 1) * (p.heads / p.kv_heads); ++h) {
    const float scale = kLog2e / p.temperature[h];
    float z_guess = 0;
    for (int64_t i = begin; i < end; i += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, end - i), low = keys.low(p, i), high = keys.high(i + rows - 1);
      const int64_t base = round_down(low, kPanel), width = round_up(high + 1, kPanel) - base;  // in panels
      const int64_t from = round_down(low, kLanes), to = round_up(high + 1, kLanes);            // in vectors
      for_rows(rows, [&](auto R) {
        for (int64_t c = base; c < to; c += kPanel) {
          const int64_t begin = std::max(c, from), skipped = begin - c, panel = c - keys.first;
          const float *columns = keys.panels + panel * p.dim + skipped, *half_norms = keys.half_norms + panel + skipped;
          for_vectors<R()>((std::min(c + kPanel, to) - begin) / kLanes, skipped, [&](auto C, int64_t whole) {
            energies<R(), S, C()>(p.q.at(b, h, i), p.q.t, columns - whole, half_norms - whole, p.dim, buffer + begin - whole - base, width);
          });
        }
        float inverse[kRows];
        for (int r = 0; r < R(); ++r) {
          float* e = buffer + r * width + (from - base);
          const int64_t first = keys.low(p, i + r), last = keys.high(i + r), row = p.row(b, h, i + r);
          const Row result = softmax_row(e, to - from, first - from, last - from, keys.masked_at(p, from), keys.num_allowed(p, first, last),
                                         p.top_k, scale, z_guess);
          p.store_row(row, result);
          inverse[r] = result.inverse;
          if (p.dropout > 0)
            for (int64_t c = from; c < to; c += kLanes)
              store(e + c - from, load(e + c - from) * dropout_scale(row_seed(p.seed, row), c, p.dropout));
        }
        weighted_sum<R()>(buffer + (low - base), width, p.v.at(b, g, low), p.v.t, high + 1 - low, inverse, p.out.at(b, h, i), p.out.t,
                          p.value_dim);
        for (int r = 0; r < R(); ++r) p.check_output(p.out.at(b, h, i + r), inverse[r]);
      });
    }
  }
}
// endregion

}  // namespace krause
