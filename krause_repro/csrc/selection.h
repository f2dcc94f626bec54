#pragma once

#include "vectors.h"

namespace krause {

// Maps floats to integers in the same order, and back.
KRAUSE_INLINE int64_t rank_of(float x) {
  int32_t i;
  std::memcpy(&i, &x, 4);
  return i < 0 ? int64_t(INT32_MIN) - i : i;
}
KRAUSE_INLINE float of_rank(int64_t rank) {
  const int32_t i = int32_t(rank < 0 ? INT32_MIN - rank : rank);
  float x;
  std::memcpy(&x, &i, 4);
  return x;
}

KRAUSE_INLINE int32_t count_at_most(const float* e, int64_t n, float t) {
  ivec even{}, odd{};
  int64_t j = 0;
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) {
    even -= load(e + j) <= t;
    odd -= load(e + j + kLanes) <= t;
  }
  if (j < n) even -= load(e + j) <= t;
  return sum(even + odd);
}

// Statistics of the finite energies in a row.
struct RowSummary {
  float lowest, highest, mean, deviation;
  int32_t finite;
};

KRAUSE_INLINE RowSummary summarize_row(const float* e, int64_t n) {
  vec lowest = broadcast(kInf), highest = broadcast(-kInf), total{}, square{};
  ivec finite{};
  for (int64_t j = 0; j < n; j += kLanes) {
    const vec x = load(e + j);
    const ivec counts = x < kInf;  // false for NaN
    finite -= counts;
    lowest = vmin(lowest, counts ? x : broadcast(kInf));
    highest = vmax(highest, counts ? x : broadcast(-kInf));
    const vec y = counts ? x : vec{};
    total += y;
    square += y * y;
  }
  RowSummary s{reduce(lowest, vmin), reduce(highest, vmax), 0, 0, sum(finite)};
  s.mean = sum(total) / std::max(s.finite, 1);
  s.deviation = std::sqrt(std::max(sum(square) / std::max(s.finite, 1) - s.mean * s.mean, 0.f));
  return s;
}

// region: threshold
// Returns a threshold with exactly k energies at or below it or, when the k-th place is tied, the k-th smallest energy itself.
// Requires 0 < k < finite. `z_guess` is the first guess, in standard deviations from the mean; it is updated for the next row.
static float threshold(const float* e, int64_t n, int32_t k, const RowSummary& s, float& z_guess) {
  float low_bound = of_rank(rank_of(s.lowest) - 1), high_bound = s.highest;  // count(low_bound) < k <= count(high_bound)
  int32_t num_below = 0, num_above = s.finite;
  bool bracketed[2] = {false, false};
  float guess = s.mean + z_guess * s.deviation;
  for (int step = 0;; ++step) {
    if (!(guess > low_bound && guess < high_bound))
      guess = low_bound + (high_bound - low_bound) * (float(k - num_below) / float(num_above - num_below));
    if (step >= 12 || !(guess > low_bound && guess < high_bound)) {
      guess = of_rank((rank_of(low_bound) + rank_of(high_bound)) >> 1);
      if (!(guess > low_bound && guess < high_bound)) return high_bound;
    }
    const int32_t count = count_at_most(e, n, guess);
    if (count == k) {
      if (s.deviation > 0) z_guess = (guess - s.mean) / s.deviation;
      return guess;
    }
    (count < k ? low_bound : high_bound) = guess;
    (count < k ? num_below : num_above) = count;
    bracketed[count > k] = true;
    if (bracketed[0] && bracketed[1]) guess = low_bound + (high_bound - low_bound) * (float(k - num_below) / float(num_above - num_below));
    else
      guess += s.deviation * float(k - count + (count < k ? 1 : -1)) * 4.f /
               float(s.finite);  // a Newton step, with the slope of a normal distribution
  }
}
// endregion

}  // namespace krause
