#pragma once

#include "vectors.h"

namespace krause {

enum Score { kKrause = 0, kSoftmax = 1, kKeyNorm = 2 };

// region: energies
// out[r, j] = energy of query r and key j, for C vectors of a panel. The panel is transposed: (dim, kPanel).
template <int R, int S, int C = kColumns>
KRAUSE_INLINE void energies(const float* q, int64_t ldq, const float* keys, const float* half_norms, int64_t dim, float* out, int64_t ldo) {
  vec acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[r][c] = S == kKeyNorm ? load(half_norms + c * kLanes) : vec{};
  for (int64_t d = 0; d < dim; ++d) {
    vec k[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) k[c] = load(keys + d * kPanel + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float x = q[r * ldq + d];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        const vec difference = k[c] - x;
        acc[r][c] = S == kKrause ? difference * difference + acc[r][c] : acc[r][c] - k[c] * x;
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store(out + r * ldo + c * kLanes, S == kKrause ? acc[r][c] * 0.5f : acc[r][c]);
}
// endregion

// acc[r, :] = sum_n w(r, n) x[n, :] for r < R, where w(r, n) = w[r * lead + n * step]. Both weighted sums below are built on it.
template <int R, int C>
KRAUSE_INLINE void accumulate_block(const float* w, int64_t lead, int64_t step, const float* x, int64_t ldx, int64_t n, vec (&acc)[R][C]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[r][c] = vec{};
  for (int64_t i = 0; i < n; ++i) {
    vec v[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) v[c] = load(x + i * ldx + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float weight = w[r * lead + i * step];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[r][c] = v[c] * weight + acc[r][c];
    }
  }
}

template <int R, int C>
KRAUSE_INLINE void weighted_block(const float* w, int64_t ldw, const float* x, int64_t ldx, int64_t n, const float* scale, float* out,
                                  int64_t ldo) {
  vec acc[R][C];
  accumulate_block<R, C>(w, ldw, 1, x, ldx, n, acc);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store(out + r * ldo + c * kLanes, acc[r][c] * scale[r]);
}

template <int R, int C>
KRAUSE_INLINE void transposed_block(const float* w, int64_t ldw, const float* x, int64_t ldx, int64_t n, float scale, float* out,
                                    int64_t ldo) {
  vec acc[R][C];
  accumulate_block<R, C>(w, 1, ldw, x, ldx, n, acc);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      float* target = out + r * ldo + c * kLanes;
      store(target, load(target) + acc[r][c] * scale);
    }
}

// Calls f(C, d) for consecutive blocks of columns, C = kColumns, 2 or 1 vectors wide, starting at column d.
template <typename F>
KRAUSE_INLINE void for_columns(int64_t dim, F f) {
  int64_t d = 0;
  for (; d + kPanel <= dim; d += kPanel) f(std::integral_constant<int, kColumns>(), d);
  if (kColumns > 2)
    for (; d + 2 * kLanes <= dim; d += 2 * kLanes) f(std::integral_constant<int, 2>(), d);
  for (; d < dim; d += kLanes) f(std::integral_constant<int, 1>(), d);
}

// out[r, :] = scale[r] * sum_j w[r, j] x[j, :]
template <int R>
static void weighted_sum(const float* w, int64_t ldw, const float* x, int64_t ldx, int64_t n, const float* scale, float* out, int64_t ldo,
                         int64_t dim) {
  for_columns(dim, [&](auto C, int64_t d) { weighted_block<R, C()>(w, ldw, x + d, ldx, n, scale, out + d, ldo); });
}

// out[j, :] += scale * sum_r w[r, j] x[r, :]
template <int R>
static void transposed_sum(const float* w, int64_t ldw, const float* x, int64_t ldx, int64_t n, float scale, float* out, int64_t ldo,
                           int64_t dim) {
  for_columns(dim, [&](auto C, int64_t d) { transposed_block<R, C()>(w, ldw, x + d, ldx, n, scale, out + d, ldo); });
}

// Calls f(R) with the number of rows as a compile-time constant.
template <typename F>
KRAUSE_INLINE void for_rows(int64_t rows, F f) {
  switch (rows) {
    case 1:
      return f(std::integral_constant<int, 1>());
    case 2:
      return f(std::integral_constant<int, 2>());
    case 3:
      return f(std::integral_constant<int, 3>());
    case 4:
      return f(std::integral_constant<int, 4>());
    case 5:
      return f(std::integral_constant<int, (kRows < 5 ? kRows : 5)>());
    default:
      return f(std::integral_constant<int, kRows>());
  }
}

}  // namespace krause
