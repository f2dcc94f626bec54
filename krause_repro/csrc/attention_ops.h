#pragma once

#include "band_backward.h"
#include "call.h"
#include "decode.h"
#include "lists.h"

namespace krause {

std::tuple<Tensor, Tensor> band_forward_op(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& tau,
                                           const OptionalTensor& key_mask, const OptionalTensor& starts, int64_t window, int64_t top_k,
                                           int64_t score, double dropout, int64_t seed) {
  Call call(query, key, value, tau, key_mask, top_k, score, dropout, seed, false);
  call.set_starts(starts);
  TORCH_CHECK(window >= 1, "krause_repro: the window must be at least 1");
  Problem& p = call.p;
  p.window = std::min(window, p.keys);
  Tensor out = empty_bthd(p.batch, p.heads, p.queries, p.value_dim, call.q.options()),
         rows = at::empty({3, p.batch, p.heads, p.queries}, out.options());
  p.out = view(out);
  p.rows = rows.mutable_data_ptr<float>();
  const bool step = p.queries == 1 && p.k.t == 1 && !p.mask && !p.starts && p.dropout == 0;  // a decode step with a ring cache
  dispatch_score(p.score, [&](auto S) {
    Segments(p, balanced_length(p)).for_each(p, 0, 1, [&](int64_t b, int64_t g, int64_t begin, int64_t end, int64_t) {
      if (step) decode_query<S()>(p, b, g);
      else band_forward<S()>(p, b, g, begin, end);
    });
  });
  if (call.nonfinite_output && !finite(value))
    return {sum_of_support(value, tau,
                           [&](const Tensor& v, const Tensor& t) {
                             return std::get<0>(band_forward_op(query, key, v, t, key_mask, starts, window, top_k, score, dropout, seed));
                           }),
            rows};
  return {finish_output(call, out, query, value), rows};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> band_backward_op(const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value,
                                                            const Tensor& tau, const OptionalTensor& key_mask,
                                                            const OptionalTensor& starts, const Tensor& out, const Tensor& rows,
                                                            int64_t window, int64_t top_k, int64_t score, double dropout, int64_t seed) {
  const FiniteInputs with(grad, query, key, value, out, rows, key_mask);
  Call call(with.query, with.key, with.value, tau, key_mask, top_k, score, dropout, seed, true);
  call.set_starts(starts);
  call.p.window = std::min(window, call.p.keys);
  const Segments segments(call.p);
  return run_backward(call, with.grad, query, key, value, rows, call.p.batch * segments.count, [&](const Problem& p) {
    dispatch_score(p.score, [&](auto S) {
      for (int64_t parity = 0; parity < 2; ++parity)
        segments.for_each(p, parity, 2, [&](int64_t b, int64_t g, int64_t begin, int64_t end, int64_t segment) {
          const int64_t offset = p.keys - p.queries, halo = p.window - 1;
          const int64_t first = segment == 0 ? 0 : begin + offset - (parity == 0 ? halo : 0);
          zero_gradients(p, b, g, first, end + offset - (parity == 1 && segment + 1 < segments.count ? halo : 0));
          band_backward<S()>(p, b, g, begin, end, p.dtemperature + (b * segments.count + segment) * p.heads);
        });
    });
  });
}

static Lists lists_of(const Problem& p, const Tensor& begin, const Tensor& token) {
  TORCH_CHECK(p.heads == p.kv_heads && p.queries == p.keys, "krause_repro: lists need as many keys as queries, and as many heads");
  TORCH_CHECK(begin.scalar_type() == at::kInt && token.scalar_type() == at::kInt && begin.is_contiguous() && token.is_contiguous() &&
                  begin.numel() == p.queries + 1 && begin.const_data_ptr<int32_t>()[p.queries] == token.numel(),
              "krause_repro: the lists do not fit");
  return {begin.const_data_ptr<int32_t>(), token.const_data_ptr<int32_t>()};
}

std::tuple<Tensor, Tensor> lists_forward_op(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& tau,
                                            const Tensor& begin, const Tensor& token, int64_t top_k, int64_t score, double dropout,
                                            int64_t seed) {
  Call call(query, key, value, tau, std::nullopt, top_k, score, dropout, seed, true);
  Problem& p = call.p;
  const Lists lists = lists_of(p, begin, token);
  Tensor out = empty_bthd(p.batch, p.heads, p.queries, p.value_dim, call.q.options()),
         rows = at::empty({3, p.batch, p.heads, p.queries}, out.options());
  p.out = view(out);
  p.rows = rows.mutable_data_ptr<float>();
  dispatch_score(p.score, [&](auto S) { for_each_head(p, [&](int64_t b, int64_t h) { lists_forward<S()>(p, lists, b, h); }); });
  if (call.nonfinite_output && !finite(value))
    return {sum_of_support(value, tau,
                           [&](const Tensor& v, const Tensor& t) {
                             return std::get<0>(lists_forward_op(query, key, v, t, begin, token, top_k, score, dropout, seed));
                           }),
            rows};
  return {finish_output(call, out, query, value), rows};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lists_backward_op(const Tensor& grad, const Tensor& query, const Tensor& key,
                                                             const Tensor& value, const Tensor& tau, const Tensor& begin,
                                                             const Tensor& token, const Tensor& out, const Tensor& rows, int64_t top_k,
                                                             int64_t score, double dropout, int64_t seed) {
  const FiniteInputs with(grad, query, key, value, out, rows, std::nullopt);
  Call call(with.query, with.key, with.value, tau, std::nullopt, top_k, score, dropout, seed, true);
  const Lists lists = lists_of(call.p, begin, token);
  return run_backward(call, with.grad, query, key, value, rows, call.p.batch, [&](const Problem& p) {
    dispatch_score(p.score, [&](auto S) {
      for_each_head(p, [&](int64_t b, int64_t h) { lists_backward<S()>(p, lists, b, h, p.dtemperature + b * p.heads); });
    });
  });
}

}  // namespace krause
