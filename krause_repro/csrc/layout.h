#pragma once

#include "products.h"
#include "weights.h"

namespace krause {

// region: view
// A (B, H, T, D) tensor as a pointer and strides.
struct View {
  float* data;
  int64_t b, h, t, d;  // strides
  float* at(int64_t i, int64_t j, int64_t k) const { return data + i * b + j * h + k * t; }
};

// The arguments of one forward or backward call.
struct Problem {
  int64_t batch, heads, kv_heads, queries, keys, dim, value_dim, window;
  int32_t top_k;  // 0 keeps all
  int score;
  float dropout;
  int64_t seed;
  View q, k, v, out, grad, dq, dk, dv;
  const float* temperature;             // (H,)
  const bool* mask;                     // (B, Tk), or null
  const int32_t* starts;                // (B, Tk), the first position of each token's segment, or null
  float* rows;                          // (3, B, H, Tq): lowest, threshold, inverse
  float* dtemperature;                  // (units, H): one partial sum for each unit of work
  std::atomic<bool>* nonfinite_output;  // set if a row has finite weights but a non-finite output

  int64_t row(int64_t b, int64_t h, int64_t i) const { return (b * heads + h) * queries + i; }
  Row load_row(int64_t row) const {
    const int64_t n = batch * heads * queries;
    return {rows[row], rows[n + row], rows[2 * n + row]};
  }
  void store_row(int64_t row, const Row& r) const {
    const int64_t n = batch * heads * queries;
    rows[row] = r.lowest;
    rows[n + row] = r.threshold;
    rows[2 * n + row] = r.inverse;
  }
  void check_output(const float* row, float inverse) const {
    if (std::isfinite(inverse) && !all_finite(row, value_dim)) nonfinite_output->store(true, std::memory_order_relaxed);
  }
};
// endregion

// Zeroes the gradients of keys and values first ... last - 1.
static void zero_gradients(const Problem& p, int64_t b, int64_t g, int64_t first, int64_t last) {
  for (int64_t j = first; j < last; ++j) {
    std::memset(p.dk.at(b, g, j), 0, p.dim * 4);
    std::memset(p.dv.at(b, g, j), 0, p.value_dim * 4);
  }
}

// A 64-byte aligned scratch buffer of floats.
struct Buffer {
  float* data;
  explicit Buffer(int64_t n) : data(static_cast<float*>(std::aligned_alloc(64, round_up(std::max<int64_t>(n, 16) * 4, 64)))) {
    if (!data) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator float*() const { return data; }
};

// Copies tokens first ... last - 1 into transposed panels (dim, kPanel), zero-padded after the last token.
static void pack(const View& x, int64_t b, int64_t h, int64_t first, int64_t last, int64_t length, int64_t dim, float* out) {
  for (int64_t base = first; base < last; base += kPanel, out += kPanel * dim) {
    const int64_t n = std::min(kPanel, length - base);
    if (n < kPanel) std::memset(out, 0, kPanel * dim * 4);
    if (x.t == 1) {  // already transposed, as in the ring cache
      for (int64_t d = 0; d < dim; ++d) std::memcpy(out + d * kPanel, x.at(b, h, base) + d * x.d, n * 4);
      continue;
    }
    for (int64_t j = 0; j < n; ++j) {
      const float* token = x.at(b, h, base + j);
      for (int64_t d = 0; d < dim; ++d) out[d * kPanel + j] = token[d];
    }
  }
}

}  // namespace krause
