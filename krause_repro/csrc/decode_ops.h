#pragma once

#include "attention_ops.h"

namespace krause {

// Attention of a query to the first `held` slots of a ring, some of whose values are not finite.
static Tensor exact_step(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& tau, int64_t held, int64_t top_k) {
  const Tensor k = keys.narrow(2, 0, held), v = values.narrow(2, 0, held);
  return sum_of_support(v, tau, [&](const Tensor& x, const Tensor& t) {
    return std::get<0>(band_forward_op(query, k, x, t, std::nullopt, std::nullopt, held, top_k, kKrause, 0, 0));
  });
}

// Writes a token's key and value into their slot of a ring.
static void write_slot(const Problem& p, int64_t b, int64_t g, int64_t slot, const float* key, const float* value) {
  float* target = p.k.at(b, g, slot);
  for (int64_t d = 0; d < p.dim; ++d) target[d * p.k.d] = key[d];
  std::memcpy(p.v.at(b, g, slot), value, p.value_dim * 4);
}

// A decode step with a ring cache: writes one token's key and value into their slot, then attends to the first `held` slots.
// A transposed key touches one cache line per dimension; the query reads all of these lines right afterwards.
Tensor ring_step_op(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& keys, const Tensor& values,
                    const Tensor& sigma, int64_t slot, int64_t held, int64_t top_k) {
  TORCH_CHECK(query.size(2) == 1 && key.size(2) == 1 && value.size(2) == 1, "ring_step: one token only");
  TORCH_CHECK(keys.size(1) > 0 && keys.sizes().slice(0, 3) == values.sizes().slice(0, 3), "ring_step: keys and values must agree");
  TORCH_CHECK(query.size(0) == keys.size(0) && query.size(1) % keys.size(1) == 0 && query.size(3) == keys.size(3) &&
                  key.sizes() == keys.narrow(2, 0, 1).sizes() && value.sizes() == values.narrow(2, 0, 1).sizes(),
              "ring_step: query, key and value must fit the ring");
  TORCH_CHECK(slot >= 0 && slot < held && held <= keys.size(2), "ring_step: the slot must be one of those held");
  constexpr double eps = std::numeric_limits<float>::epsilon();
  const Tensor k = prepare(key), v = prepare(value), tau = sigma.square().clamp_min(eps * eps);  // as in `score_temperature`
  Call call(query, keys.narrow(2, 0, held), values.narrow(2, 0, held), tau, std::nullopt, top_k, kKrause, 0, 0, false);
  Problem& p = call.p;
  TORCH_CHECK(p.k.data == keys.data_ptr() && p.v.data == values.data_ptr(), "ring_step: the ring must be float32, in whole vectors");
  const View new_keys = view(k), new_values = view(v);
  Tensor out = empty_bthd(p.batch, p.heads, 1, p.value_dim, call.q.options()), rows = at::empty({3, p.batch, p.heads, 1}, out.options());
  p.out = view(out);
  p.rows = rows.mutable_data_ptr<float>();
  Segments(p).for_each(p, 0, 1, [&](int64_t b, int64_t g, int64_t begin, int64_t end, int64_t) {
    write_slot(p, b, g, slot, new_keys.at(b, g, 0), new_values.at(b, g, 0));
    if (p.k.t == 1) decode_query<kKrause>(p, b, g);
    else band_forward<kKrause>(p, b, g, begin, end);
  });
  return call.nonfinite_output ? exact_step(call.q, keys, values, tau, held, top_k) : out;
}

Tensor decode_linear_op(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  const int64_t size = weight.size(1), outputs = weight.size(0);
  TORCH_CHECK(input.size(-1) == size && size % kLanes == 0 && outputs % kOutputs == 0, "decode_linear: shapes do not fit");
  TORCH_CHECK(input.scalar_type() == at::kFloat && weight.scalar_type() == at::kFloat, "decode_linear: float32 only");
  TORCH_CHECK(size > 0 && (!bias || (bias->numel() == outputs && bias->scalar_type() == at::kFloat)),
              "decode_linear: the bias does not fit");
  const Tensor x = input.contiguous(), w = weight.contiguous(), b = bias ? bias->contiguous() : Tensor();
  auto sizes = input.sizes().vec();
  sizes.back() = outputs;
  Tensor out = at::empty(sizes, x.options());
  const float *inputs = x.const_data_ptr<float>(), *weights = w.const_data_ptr<float>();
  const float* added = bias ? b.const_data_ptr<float>() : nullptr;
  float* results = out.mutable_data_ptr<float>();
  at::parallel_for(0, outputs / kOutputs, 1 + 32768 / (kOutputs * size), [&](int64_t first, int64_t last) {
    gemv_rows(inputs, x.numel() / size, size, weights, added, outputs, first, last, results);
  });
  return out;
}

// Rotary position embedding of query and key (B, T, H, D), returned as (B, H, T, D); cosine and sine are (B or 1, T, D).
std::tuple<Tensor, Tensor> rotate_op(const Tensor& query, const Tensor& key, const Tensor& cosine, const Tensor& sine) {
  const int64_t length = query.size(1), dim = query.size(3), tokens = query.size(0) * length;
  TORCH_CHECK(key.size(0) == query.size(0) && key.size(1) == length && key.size(3) == dim && dim % (2 * kLanes) == 0,
              "rotate: query and key do not fit");
  TORCH_CHECK(cosine.sizes() == sine.sizes() && cosine.dim() == 3 && cosine.size(1) == length && cosine.size(2) == dim &&
                  (cosine.size(0) == 1 || cosine.size(0) == query.size(0)),
              "rotate: cosine and sine do not fit");
  for (const Tensor* x : {&query, &key, &cosine, &sine}) TORCH_CHECK(x->scalar_type() == at::kFloat, "rotate: float32 only");
  const Tensor cosines = cosine.contiguous(), sines = sine.contiguous();
  const int64_t stride = cosine.size(0) == 1 ? 0 : length * dim;  // between the positions of two sequences
  std::array<Tensor, 2> in{query.contiguous(), key.contiguous()}, out{at::empty_like(in[0]), at::empty_like(in[1])};
  const float *c = cosines.const_data_ptr<float>(), *s = sines.const_data_ptr<float>();
  for (int i = 0; i < 2; ++i) {
    const int64_t heads = in[i].size(2);
    const float* x = in[i].const_data_ptr<float>();
    float* y = out[i].mutable_data_ptr<float>();
    at::parallel_for(0, tokens, 1 + 32768 / (heads * dim), [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) {
        const int64_t position = n / length * stride + n % length * dim;
        for (int64_t at = n * heads * dim; at < (n + 1) * heads * dim; at += dim) rotate(x + at, c + position, s + position, dim, y + at);
      }
    });
  }
  return {out[0].transpose(1, 2), out[1].transpose(1, 2)};
}

Tensor gate_op(const Tensor& standard, const Tensor& other, const Tensor& weight, const Tensor& bias) {
  const int64_t width = standard.size(-1);
  TORCH_CHECK(standard.sizes() == other.sizes() && width > 0 && width % kLanes == 0 && weight.dim() == 2 && weight.size(0) == 2 &&
                  weight.size(1) == 2 * width && bias.numel() == 2,
              "gate: shapes do not fit");
  for (const Tensor* x : {&standard, &other, &weight, &bias}) TORCH_CHECK(x->scalar_type() == at::kFloat, "gate: float32 only");
  const Tensor a = standard.contiguous(), b = other.contiguous(), w = weight.contiguous(), c = bias.contiguous(), out = at::empty_like(a);
  const float *x = a.const_data_ptr<float>(), *y = b.const_data_ptr<float>(), *weights = w.const_data_ptr<float>(),
              *added = c.const_data_ptr<float>();
  float* mixture = out.mutable_data_ptr<float>();
  at::parallel_for(0, a.numel() / width, 1 + 16384 / width, [&](int64_t first, int64_t last) {
    for (int64_t n = first * width; n < last * width; n += width) gate_token(x + n, y + n, weights, added, width, mixture + n);
  });
  return out;
}

static bool is_plain(const Tensor& x, at::IntArrayRef sizes) {
  return x.sizes() == sizes && x.scalar_type() == at::kFloat && x.device().is_cpu() && x.is_contiguous();
}

// The q, k, v and o projections of a branch.
struct Projections {
  int64_t inputs[4], outputs[4];
  const float *weight[4] = {}, *bias[4] = {};
  std::array<Tensor, 4> kept = {};  // the biases

  // Returns false unless all are float32, contiguous and of the expected size.
  bool read(at::TensorList weights, const c10::List<OptionalTensor>& biases) {
    for (int i = 0; i < 4; ++i) {
      const OptionalTensor given = biases.get(i);
      if (!is_plain(weights[i], {outputs[i], inputs[i]}) || (given && !is_plain(*given, {outputs[i]}))) return false;
      if (given) kept[i] = *given;
      weight[i] = weights[i].const_data_ptr<float>();
      bias[i] = given ? kept[i].const_data_ptr<float>() : nullptr;
    }
    return true;
  }
  // Applies projections from ... to - 1 to the same rows.
  void apply(int from, int to, const float* x, int64_t rows, float* const* out) const {
    int64_t begins[5] = {};
    for (int i = from; i < to; ++i) begins[i + 1] = begins[i] + outputs[i] / kOutputs;
    at::parallel_for(0, begins[to], 1 + 32768 / (kOutputs * inputs[from]), [&](int64_t first, int64_t last) {
      for (int i = from; i < to; ++i) {
        const int64_t begin = std::max(first, begins[i]) - begins[i], end = std::min(last, begins[i + 1]) - begins[i];
        if (begin < end) gemv_rows(x, rows, inputs[i], weight[i], bias[i], outputs[i], begin, end, out[i]);
      }
    });
  }
};

// One token through a branch: q, k and v projections, rotary positions, ring attention, o projection, gate. hidden and standard are
// (B, 1, d). Returns None, without side effects, for unsupported dtypes, layouts, sizes or batches.
std::optional<Tensor> branch_step_op(const Tensor& standard, const Tensor& hidden, at::TensorList weights,
                                     const c10::List<OptionalTensor>& biases, const Tensor& cosine, const Tensor& sine, const Tensor& keys,
                                     const Tensor& values, const Tensor& log_sigma, const Tensor& gate, const Tensor& gate_bias,
                                     int64_t slot, int64_t held, int64_t top_k) {
  TORCH_CHECK(weights.size() == 4 && biases.size() == 4, "branch_step: there are four projections");
  TORCH_CHECK(keys.dim() == 4 && hidden.dim() == 3, "branch_step: keys (B, H, W, D) and hidden states (B, 1, d)");
  TORCH_CHECK(slot >= 0 && slot < held && held <= keys.size(2), "branch_step: the slot must be one of those held");
  const int64_t batch = hidden.size(0), width = hidden.size(2), groups = keys.size(1), ring = keys.size(2), dim = keys.size(3);
  const int64_t heads = log_sigma.numel(), positions = cosine.dim() == 3 ? cosine.size(0) : 0;
  Projections projections{{width, width, width, heads * dim}, {heads * dim, groups * dim, groups * dim, width}};
  bool fits =
      batch > 0 && batch <= KRAUSE_MAX_DECODE_ROWS && groups > 0 && heads % groups == 0 && dim % (2 * kLanes) == 0 && width % kLanes == 0;
  fits = fits && is_plain(hidden, {batch, 1, width}) && is_plain(standard, {batch, 1, width});
  fits = fits && is_plain(keys.transpose(2, 3), {batch, groups, dim, ring}) && is_plain(values, {batch, groups, ring, dim});
  fits = fits && (positions == 1 || positions == batch) && is_plain(cosine, {positions, 1, dim}) && is_plain(sine, {positions, 1, dim});
  fits = fits && is_plain(log_sigma, {heads}) && is_plain(gate, {2, 2 * width}) && is_plain(gate_bias, {2}) &&
         projections.read(weights, biases);
  if (!fits) return std::nullopt;

  const Buffer q(batch * heads * dim), k(batch * groups * dim), v(batch * groups * dim), attended(batch * heads * dim),
      other(batch * width), rows(3 * batch * heads), temperature(heads);
  float* const projected[] = {q, k, v, other};
  projections.apply(0, 3, hidden.const_data_ptr<float>(), batch, projected);

  constexpr float eps = std::numeric_limits<float>::epsilon();
  for (int64_t h = 0; h < heads; ++h)  // as in `score_temperature`
    temperature[h] = std::max(std::exp(2 * log_sigma.const_data_ptr<float>()[h]), eps * eps);
  std::atomic<bool> nonfinite_output{false};
  Problem p{};
  p.nonfinite_output = &nonfinite_output;
  p.batch = batch, p.heads = heads, p.kv_heads = groups, p.queries = 1, p.keys = held, p.dim = dim, p.value_dim = dim, p.window = held;
  p.top_k = int32_t(top_k), p.score = kKrause, p.temperature = temperature, p.rows = rows;
  p.q = {q, heads * dim, dim, dim, 1}, p.out = {attended, heads * dim, dim, dim, 1}, p.k = view(keys), p.v = view(values);
  const int64_t stride = positions == 1 ? 0 : dim, share = heads / groups;
  const float *cosines = cosine.const_data_ptr<float>(), *sines = sine.const_data_ptr<float>();
  at::parallel_for(0, batch * groups, 1, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      const int64_t b = n / groups, g = n % groups;
      const auto turn = [&](float* head) { rotate(head, cosines + b * stride, sines + b * stride, dim, head); };
      for (int64_t h = g * share; h < (g + 1) * share; ++h) turn(p.q.at(b, h, 0));
      turn(k + n * dim);
      write_slot(p, b, g, slot, k + n * dim, v + n * dim);
      decode_query<kKrause>(p, b, g);
    }
  });

  if (nonfinite_output) {
    const Tensor query = at::from_blob(q, {batch, heads, 1, dim}, hidden.options());
    const Tensor tau = at::from_blob(temperature, {heads}, hidden.options());
    const Tensor exact = exact_step(query, keys, values, tau, held, top_k).contiguous();
    std::memcpy(attended, exact.const_data_ptr<float>(), exact.nbytes());
  }

  projections.apply(3, 4, attended, batch, projected);
  Tensor out = at::empty_like(standard);
  const float *gates = gate.const_data_ptr<float>(), *added = gate_bias.const_data_ptr<float>(), *one = standard.const_data_ptr<float>();
  float* mixture = out.mutable_data_ptr<float>();
  for (int64_t n = 0; n < batch * width; n += width) gate_token(one + n, other + n, gates, added, width, mixture + n);
  return out;
}

}  // namespace krause
