#pragma once

#include "selection.h"

namespace krause {

// The state of a row that the backward pass needs; inverse = 1 / sum of weights.
struct Row {
  float lowest, threshold, inverse;
};

// region: softmax_row
// Turns the energies e[0, n) into unnormalised softmax weights, in place. Columns outside first ... last, and columns with masked > 0,
// get zero weight. `num_allowed` is the number of columns that remain: if fewer energies are finite, the row is NaN.
static Row softmax_row(float* e, int64_t n, int64_t first, int64_t last, const float* masked, int32_t num_allowed, int32_t top_k,
                       float scale, float& z_guess) {
  std::fill(e, e + first, kInf);
  std::fill(e + last + 1, e + n, kInf);
  if (masked)
    for (int64_t j = 0; j < n; j += kLanes) store(e + j, load(masked + j) > 0.f ? broadcast(kInf) : load(e + j));
  const RowSummary s = summarize_row(e, n);
  Row row{s.lowest, std::numeric_limits<float>::max(), 0};
  if (s.finite < num_allowed || !s.finite) {
    row.lowest = 0;
    row.inverse = s.finite < num_allowed ? std::numeric_limits<float>::quiet_NaN() : 0;
    std::fill(e, e + n, 0.f);
    return row;
  }
  if (top_k > 0 && s.finite > top_k) row.threshold = threshold(e, n, top_k, s, z_guess);
  vec mass{};
  for (int64_t j = 0; j < n; j += kLanes) {
    const vec x = load(e + j);
    const vec weight = x <= row.threshold ? exp2((row.lowest - x) * scale) : vec{};
    mass += weight;
    store(e + j, weight);
  }
  row.inverse = 1 / sum(mass);
  return row;
}
// endregion

// Dropout is a pure function of seed, row and column, so the backward pass can regenerate it.
KRAUSE_INLINE uint64_t hash64(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}
KRAUSE_INLINE uint32_t row_seed(int64_t seed, int64_t row) { return uint32_t(hash64(uint64_t(seed) ^ hash64(uint64_t(row)))); }
// 1 / (1 - dropout) where a weight is kept, else 0.
KRAUSE_INLINE vec dropout_scale(uint32_t seed, int64_t column, float dropout) {
  uvec x;
  for (int i = 0; i < kLanes; ++i) x[i] = uint32_t(column + i);
  x = x * 0x9E3779B1u + seed;
  x ^= x >> 16;
  x *= 0x85EBCA6Bu;
  x ^= x >> 13;
  x *= 0xC2B2AE35u;
  x ^= x >> 16;
  return (ivec)(x >> 8) >= int32_t(dropout * 16777216.f) ? broadcast(1 / (1 - dropout)) : vec{};
}

}  // namespace krause
