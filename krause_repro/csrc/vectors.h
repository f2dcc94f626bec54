#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <vector>

namespace krause {

// region: vectors
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 6, kColumns = 4;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 4, kColumns = 2;
#else
constexpr int kLanes = 4, kRows = 4, kColumns = 4;
#endif
constexpr int64_t kPanel = kLanes * kColumns;  // keys scored at a time
constexpr int64_t kTile = 8 * kRows;           // queries per tile of the backward pass
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.4426950408889634f;

typedef float vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t ivec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t uvec __attribute__((vector_size(kLanes * 4)));
#define KRAUSE_INLINE static inline __attribute__((always_inline))

KRAUSE_INLINE vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
KRAUSE_INLINE void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
KRAUSE_INLINE vec broadcast(float x) { return x - vec{}; }
KRAUSE_INLINE vec vmin(vec a, vec b) { return a < b ? a : b; }
KRAUSE_INLINE vec vmax(vec a, vec b) { return a > b ? a : b; }
// endregion

// Swaps the lanes whose indices differ in bit W.
template <int W, typename V>
KRAUSE_INLINE V xor_lane(V v) {
#if defined(__clang__)
  V other{};
  for (int i = 0; i < kLanes; ++i) other[i] = v[i ^ W];
  return other;
#else
  ivec order{};
  for (int i = 0; i < kLanes; ++i) order[i] = i ^ W;
  return __builtin_shuffle(v, order);
#endif
}

// Reduces all lanes pairwise.
template <typename V, typename F>
KRAUSE_INLINE auto reduce(V v, F combine) {
  if (kLanes > 8) v = combine(v, xor_lane<8>(v));
  if (kLanes > 4) v = combine(v, xor_lane<4>(v));
  v = combine(v, xor_lane<2>(v));
  return combine(v, xor_lane<1>(v))[0];
}
KRAUSE_INLINE float sum(vec v) {
  return reduce(v, [](vec a, vec b) { return a + b; });
}
KRAUSE_INLINE int32_t sum(ivec v) {
  return reduce(v, [](ivec a, ivec b) { return a + b; });
}

KRAUSE_INLINE bool all_finite(const float* x, int64_t n) {  // n is a multiple of kLanes
  vec total{};
  for (int64_t j = 0; j < n; j += kLanes) total += load(x + j) - load(x + j);
  return sum(total) == 0;
}

KRAUSE_INLINE int64_t round_down(int64_t x, int64_t unit) { return x / unit * unit; }
KRAUSE_INLINE int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// region: exp2
KRAUSE_INLINE vec exp2(vec x) {
  const vec shift = broadcast(12582912.f);  // 1.5 · 2^23: adding it rounds to an integer, left in the low bits
  const vec bounded = vmax(x, broadcast(-127.f));
  const vec rounded = bounded + shift;
  const vec f = bounded - (rounded - shift);
  vec p = broadcast(1.5403530393381609954e-4f);
  p = p * f + 1.3333558146428443423e-3f;
  p = p * f + 9.6181291076284771619e-3f;
  p = p * f + 5.5504108664821579953e-2f;
  p = p * f + 2.4022650695910071233e-1f;
  p = p * f + 6.9314718055994530942e-1f;
  p = p * f + 1.f;
  return x > -126.f ? (vec)((ivec)p + ((ivec)rounded << 23)) : vec{};
}
// endregion

}  // namespace krause
