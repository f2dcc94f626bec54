#pragma once

#include "layout.h"

namespace krause {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// x in float32, padded to whole vectors, with contiguous rows (or, for the keys of a forward pass, columns).
static Tensor prepare(const Tensor& x, bool transposed_too = false) {
  Tensor y = x.to(at::kFloat);
  if (y.size(3) % kLanes) y = at::constant_pad_nd(y, {0, kLanes - y.size(3) % kLanes});
  return y.stride(3) == 1 || (transposed_too && y.stride(2) == 1) ? y : y.contiguous();
}
static View view(const Tensor& x) { return {static_cast<float*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2), x.stride(3)}; }
// An uninitialised tensor. Large ones ask for huge pages: clearing thousands of small pages at first touch is slow.
static Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
  Tensor x = at::empty(sizes, options);
#if defined(__linux__)
  constexpr uintptr_t page = uintptr_t(1) << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(x.data_ptr()) + page - 1) & ~(page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(x.data_ptr()) + x.nbytes()) & ~(page - 1);
  if (end > begin && x.nbytes() >= 16 * page) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return x;
}
// A (B, H, T, D) tensor stored as (B, T, H, D): the output projection then needs no copy.
static Tensor empty_bthd(int64_t batch, int64_t heads, int64_t length, int64_t dim, const at::TensorOptions& options) {
  return empty_large({batch, length, heads, dim}, options).transpose(1, 2);
}
// An uninitialised gradient in the memory layout of x.
static Tensor empty_as(const Tensor& x, int64_t dim, const at::TensorOptions& options) {
  if (x.stride(1) < x.stride(2)) return empty_bthd(x.size(0), x.size(1), x.size(2), dim, options);
  return empty_large({x.size(0), x.size(1), x.size(2), dim}, options);
}
// x without its padding, copied into the tensor that `empty` makes if the dtype or size differs.
template <typename F>
static Tensor unpad(const Tensor& x, int64_t dim, at::ScalarType dtype, F empty) {
  if (x.size(3) == dim && x.scalar_type() == dtype) return x;
  Tensor result = empty(x.options().dtype(dtype));
  return result.copy_(x.narrow(3, 0, dim));
}

// The tensors that a Problem points to, checked and converted.
struct Call {
  Tensor q, k, v, temperature, mask, starts;
  std::atomic<bool> nonfinite_output{false};
  Problem p{};
  Call(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& tau, const OptionalTensor& key_mask, int64_t top_k,
       int64_t score, double dropout, int64_t seed, bool backward)
      : q(prepare(checked(query))),
        k(prepare(checked(key), !backward)),
        v(prepare(checked(value))),
        temperature(tau.to(at::kFloat).expand({query.size(1)}).contiguous()) {
    TORCH_CHECK(query.size(0) == key.size(0) && query.size(3) == key.size(3) && key.sizes().slice(0, 3) == value.sizes().slice(0, 3) &&
                    key.size(1) > 0 && query.size(1) % key.size(1) == 0 && query.size(2) <= key.size(2),
                "krause_repro: query, key and value do not fit together");
    TORCH_CHECK(top_k >= 0 && score >= kKrause && score <= kKeyNorm && dropout >= 0 && dropout <= 1,
                "krause_repro: top_k, score or dropout is out of range");
    TORCH_CHECK(!key_mask || (key_mask->scalar_type() == at::kBool && key_mask->is_cpu() && key_mask->dim() == 2 &&
                              key_mask->size(0) == key.size(0) && key_mask->size(1) == key.size(2)),
                "krause_repro: key_mask must be of shape (batch, keys) and bool");
    p.nonfinite_output = &nonfinite_output;
    p.batch = q.size(0);
    p.heads = q.size(1);
    p.kv_heads = k.size(1);
    p.queries = q.size(2);
    p.keys = k.size(2);
    p.dim = q.size(3);
    p.value_dim = v.size(3);
    p.window = p.keys;
    p.top_k = int32_t(std::min(top_k, p.keys));
    p.score = int(score);
    p.dropout = float(dropout);
    p.seed = seed;
    p.q = view(q);
    p.k = view(k);
    p.v = view(v);
    p.temperature = temperature.const_data_ptr<float>();
    if (key_mask) {
      mask = key_mask->contiguous();
      p.mask = mask.const_data_ptr<bool>();
    }
  }
  // Where the segment of each token starts. The kernels rely on the order: a later row never reaches further back.
  void set_starts(const OptionalTensor& given) {
    if (!given) return;
    TORCH_CHECK(given->scalar_type() == at::kInt && given->is_cpu() && given->dim() == 2 && given->size(0) == p.batch &&
                    given->size(1) == p.keys,
                "krause_repro: starts must be of shape (batch, keys) and int32");
    starts = given->contiguous();
    p.starts = starts.const_data_ptr<int32_t>();
    for (int64_t n = 0; n < p.batch * p.keys; ++n)
      TORCH_CHECK(p.starts[n] >= (n % p.keys ? p.starts[n - 1] : 0) && p.starts[n] <= n % p.keys,
                  "krause_repro: starts must not decrease, and each must be at or before its token");
  }
  static const Tensor& checked(const Tensor& x) {
    TORCH_CHECK(x.dim() == 4 && x.is_cpu() && x.is_floating_point(), "krause_repro: x must be floating, of four dimensions, on a CPU");
    return x;
  }
};

static bool finite(const Tensor& x) { return std::isfinite(x.sum(at::kFloat).item<float>()); }

// The exact output where values are not finite: an infinite or NaN value counts only in rows that keep its key. attend(values, tau)
// is the same attention with other values and temperatures; at infinite temperature all kept keys have equal weight.
template <typename F>
static Tensor sum_of_support(const Tensor& value, const Tensor& tau, F attend) {
  const Tensor bad = value.isfinite().logical_not(), none = value.isneginf(), all = value.isposinf();
  const Tensor flags = at::cat({bad.logical_and(none.logical_not()), bad.logical_and(all.logical_not())}, 3).to(value.scalar_type());
  const Tensor total = attend(value.masked_fill(bad, 0), tau), reached = attend(flags, at::full_like(tau, kInf)).gt(0);
  const Tensor above = reached.narrow(3, 0, value.size(3)), below = reached.narrow(3, value.size(3), value.size(3));
  return total.masked_fill(above, kInf).masked_fill(below, -kInf).masked_fill(above.logical_and(below), std::nan(""));
}

static Tensor finish_output(const Call& call, const Tensor& out, const Tensor& query, const Tensor& value) {
  return unpad(out, value.size(3), query.scalar_type(), [&](const at::TensorOptions& options) {
    return empty_bthd(call.p.batch, call.p.heads, call.p.queries, value.size(3), options);
  });
}

template <typename F>
static void dispatch_score(int score, F f) {
  if (score == kKrause) return f(std::integral_constant<int, kKrause>());
  if (score == kSoftmax) return f(std::integral_constant<int, kSoftmax>());
  f(std::integral_constant<int, kKeyNorm>());
}

constexpr int64_t kMinUnitsPerThread = 3;  // units of work

// Splits the queries into segments, the units of work. A segment is at least a window long, so only adjacent segments share keys.
struct Segments {
  int64_t length, count, lists;
  explicit Segments(const Problem& p, int64_t longest = 8 * kTile)
      : length(std::max<int64_t>(round_up(p.window, kTile), longest)),
        count((p.queries + length - 1) / length),
        lists(p.batch * p.kv_heads) {}
  // Calls f(batch, key head, first query, last query + 1, segment) for segments first, first + stride, ..., in parallel.
  template <typename F>
  void for_each(const Problem& p, int64_t first, int64_t stride, F f) const {
    const int64_t mine = (count - first + stride - 1) / stride;
    at::parallel_for(0, mine * lists, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        // heads innermost: the heads of one token are often adjacent in memory
        const int64_t head = n % p.kv_heads, segment = first + stride * (n / p.kv_heads % mine);
        f(n / (p.kv_heads * mine), head, segment * length, std::min(p.queries, (segment + 1) * length), segment);
      }
    });
  }
};

// A segment length that gives every thread work in a short forward pass.
static int64_t balanced_length(const Problem& p) {
  return std::clamp(round_up(p.queries * p.batch * p.kv_heads / (kMinUnitsPerThread * at::get_num_threads()), kTile), kTile, 8 * kTile);
}

// The backward pass multiplies some inputs by zero weights: values outside a row's support, queries and keys of NaN rows, padding.
// These must be finite, so non-finite vectors become zeros. No gradient flows through a non-finite output.
struct FiniteInputs {
  Tensor grad, query, key, value;
  FiniteInputs(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& rows,
               const OptionalTensor& key_mask)
      : grad(dout), query(q), key(k), value(v) {
    if (!finite(value)) {
      grad = grad.masked_fill(out.isfinite().logical_not(), 0);
      value = value.masked_fill(value.isfinite().logical_not(), 0);
    }
    if (finite(rows.select(0, 2)) && !(key_mask && !finite(key))) return;
    query = without_bad(query);
    key = without_bad(key);
  }
  static Tensor without_bad(const Tensor& x) { return x.masked_fill(x.to(at::kFloat).square().sum(-1, true).isfinite().logical_not(), 0); }
};

// The common part of both backward operators: allocates padded gradients, lets `run` fill them, and restores shapes and dtypes.
template <typename F>
static std::tuple<Tensor, Tensor, Tensor, Tensor> run_backward(Call& call, const Tensor& grad, const Tensor& query, const Tensor& key,
                                                               const Tensor& value, const Tensor& rows, int64_t partials, F run) {
  Problem& p = call.p;
  const auto options = call.q.options();
  const Tensor dout = prepare(grad), saved = rows.contiguous();
  Tensor dq = empty_as(query, p.dim, options), dk = empty_as(key, p.dim, options), dv = empty_as(value, p.value_dim, options),
         dtau = at::zeros({partials, p.heads}, options);
  p.grad = view(dout);
  p.dq = view(dq);
  p.dk = view(dk);
  p.dv = view(dv);
  p.rows = static_cast<float*>(saved.data_ptr());
  p.dtemperature = dtau.mutable_data_ptr<float>();
  run(p);
  const auto done = [&](const Tensor& gradient, const Tensor& x) {
    return unpad(gradient, x.size(3), x.scalar_type(), [&](const at::TensorOptions& o) { return empty_as(x, x.size(3), o); });
  };
  return {done(dq, query), done(dk, key), done(dv, value), dtau.sum(0)};
}

template <typename F>
static void for_each_head(const Problem& p, F f) {
  at::parallel_for(0, p.batch * p.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) f(n / p.heads, n % p.heads);
  });
}

}  // namespace krause
