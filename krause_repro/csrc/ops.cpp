// The operators of krause_repro as PyTorch sees them.
#include "attention_ops.h"
#include "decode_ops.h"

namespace krause {

// Forward-mode derivatives, missing gradients and torch.func transforms raise an error instead of being ignored.
template <typename F>
static void each_tensor(const c10::OperatorHandle& op, const torch::jit::Stack& stack, F f) {
  for (const c10::IValue& x : torch::jit::last(stack, op.schema().arguments().size())) {
    if (x.isTensor()) f(x.toTensor());
    else if (x.isList())
      for (const c10::IValue& y : x.toListRef())
        if (y.isTensor()) f(y.toTensor());
  }
}
static void reject_tangents(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  each_tensor(op, *stack, [&](const Tensor& x) {
    TORCH_CHECK(!x._fw_grad(0).defined(), op.schema().name(), " has no forward-mode derivative; use implementation=\"reference\"");
  });
  const at::AutoDispatchBelowADInplaceOrView below;
  op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
}
static void reject_gradients(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  each_tensor(op, *stack, [&](const Tensor& x) {
    TORCH_CHECK(!x.requires_grad() || !at::GradMode::is_enabled(), op.schema().name(),
                " has no gradient; use torch.no_grad(), or implementation=\"reference\"");
    TORCH_CHECK(!x._fw_grad(0).defined(), op.schema().name(), " has no forward-mode derivative; use implementation=\"reference\"");
  });
  const at::AutoDispatchBelowADInplaceOrView below;
  op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
}
static void reject_transforms(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK(false, op.schema().name(), " does not support transforms of torch.func (vmap, grad, jvp, ...); use implementation=\"reference\"");
}

}  // namespace krause

TORCH_LIBRARY_FRAGMENT(krause_repro, m) {
  m.def(
      "band(Tensor query, Tensor key, Tensor value, Tensor tau, Tensor? key_mask, Tensor? starts, int window, int top_k, int "
      "score, float dropout, int seed) -> (Tensor, Tensor)");
  m.def(
      "band_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor tau, Tensor? key_mask, Tensor? starts, Tensor out, Tensor "
      "rows, int window, int top_k, int score, float dropout, int seed) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "ring_step(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor sigma, int slot, int held, int "
      "top_k) -> Tensor");
  m.def("decode_linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
  m.def("rotate(Tensor query, Tensor key, Tensor cosine, Tensor sine) -> (Tensor, Tensor)");
  m.def("gate(Tensor standard, Tensor other, Tensor weight, Tensor bias) -> Tensor");
  m.def(
      "branch_step(Tensor standard, Tensor hidden, Tensor[] weights, Tensor?[] biases, Tensor cosine, Tensor sine, Tensor(a!) keys, "
      "Tensor(b!) values, Tensor log_sigma, Tensor gate, Tensor gate_bias, int slot, int held, int top_k) -> Tensor?");
  m.def(
      "lists(Tensor query, Tensor key, Tensor value, Tensor tau, Tensor begin, Tensor token, int top_k, int score, float dropout, int "
      "seed) -> (Tensor, Tensor)");
  m.def(
      "lists_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor tau, Tensor begin, Tensor token, Tensor out, Tensor "
      "rows, int top_k, "
      "int score, float dropout, int seed) -> (Tensor, Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(krause_repro, CPU, m) {
  m.impl("band", &krause::band_forward_op);
  m.impl("band_backward", &krause::band_backward_op);
  m.impl("ring_step", &krause::ring_step_op);
  m.impl("decode_linear", &krause::decode_linear_op);
  m.impl("rotate", &krause::rotate_op);
  m.impl("gate", &krause::gate_op);
  m.impl("branch_step", &krause::branch_step_op);
  m.impl("lists", &krause::lists_forward_op);
  m.impl("lists_backward", &krause::lists_backward_op);
}
TORCH_LIBRARY_IMPL(krause_repro, ADInplaceOrView, m) {
  for (const char* name : {"band", "band_backward", "lists", "lists_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&krause::reject_tangents>());
}
TORCH_LIBRARY_IMPL(krause_repro, AutogradCPU, m) {
  for (const char* name : {"ring_step", "decode_linear", "rotate", "gate", "branch_step"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&krause::reject_gradients>());
}
TORCH_LIBRARY_IMPL(krause_repro, FuncTorchDynamicLayerFrontMode, m) {
  for (const char* name : {"band", "lists", "ring_step", "decode_linear", "rotate", "gate", "branch_step"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&krause::reject_transforms>());
}
