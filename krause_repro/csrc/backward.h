#pragma once

#include "layout.h"

namespace krause {

// region: backward_row
// Recomputes the weights of one vector of columns, before dropout; zero outside the support. `shifted` becomes lowest - E.
KRAUSE_INLINE vec recompute_weights(const Row& row, float scale, const float* masked, const float* e, int64_t j, vec& shifted) {
  const vec energy = masked == nullptr ? load(e + j) : load(masked + j) > 0.f ? broadcast(kInf) : load(e + j);
  const ivec kept = energy <= row.threshold;
  shifted = kept ? row.lowest - energy : vec{};
  return kept ? exp2(shifted * scale) * row.inverse : vec{};
}

// Turns one row's energies e into weights (after dropout), and s, which holds -do·v, into dS. Returns sum_j dS_j (lowest - E_j), the
// row's contribution to -tau² dtau. `columns` accumulates the column sums of dS. do·o is summed here from the same do·v: with almost all
// weight on one key the difference of the two is tiny, and dividing by tau would magnify another rounding.
KRAUSE_INLINE float backward_row(const Problem& p, const Row& row, float scale, uint32_t seed, const float* masked, int64_t column,
                                 int64_t n, float* e, float* s, float* columns) {
  const auto dropout_at = [&](int64_t j) { return p.dropout > 0 ? dropout_scale(seed, column + j, p.dropout) : broadcast(1); };
  vec shifted{}, dtau{}, total{};
  for (int64_t j = 0; j < n; j += kLanes) total -= recompute_weights(row, scale, masked, e, j, shifted) * load(s + j) * dropout_at(j);
  float delta = sum(total);
  if (std::isnan(row.inverse)) delta = 0;  // the weights of such a row are NaN; NaN times zero would also reach keys that it does not see
  for (int64_t j = 0; j < n; j += kLanes) {
    const vec weight = recompute_weights(row, scale, masked, e, j, shifted), kept = dropout_at(j);
    const vec slope = weight * (-load(s + j) * kept - delta);
    dtau += slope * shifted;
    store(e + j, weight * kept);
    store(s + j, slope);
    if (columns) store(columns + j, load(columns + j) + slope);
  }
  return sum(dtau);
}
// endregion

KRAUSE_INLINE float dot(const float* x, const float* y, int64_t dim) {
  vec total{};
  for (int64_t d = 0; d < dim; d += kLanes) total += load(x + d) * load(y + d);
  return sum(total);
}

}  // namespace krause
