// A bias and GELU as ops of PyTorch, for the CPU.
#include "../checks.h"
#include "gelu.h"

namespace vitrail {
namespace {

void* data_of(const std::string& name, const Tensor& tensor, ScalarType type, int64_t count) {
  check_type(name, tensor, type);
  require(tensor.device().is_cpu() && tensor.is_contiguous() && tensor.numel() == count, name, " must hold ", count,
          " adjacent values on the CPU, got sizes ", listed(tensor.sizes()), " with strides ", listed(tensor.strides()));
  return tensor.data_ptr();
}

GeluCall call_of(const Tensor& x, const Tensor& bias) {
  require(has_avx512_bf16(), "this CPU has no AVX-512 with BF16; use the reference");
  require(bias.sizes().size() == 1 && bias.numel() > 0 && bias.numel() % 16 == 0,
          "bias must have one dimension, whose size is a multiple of 16, got sizes ", listed(bias.sizes()));
  require(!x.sizes().empty() && x.sizes()[x.sizes().size() - 1] == bias.numel(), "x must have ", bias.numel(),
          " columns, got sizes ", listed(x.sizes()));
  GeluCall call{};
  call.columns = bias.numel();
  call.rows = x.numel() / call.columns;
  call.x = static_cast<const bf16*>(data_of("x", x, ScalarType::BFloat16, x.numel()));
  call.bias = static_cast<const float*>(data_of("bias", bias, ScalarType::Float, call.columns));
  return call;
}

void forward_op(Tensor out, Tensor x, Tensor bias) {
  GeluCall call = call_of(x, bias);
  call.out = static_cast<bf16*>(data_of("out", out, ScalarType::BFloat16, x.numel()));
#if defined(__x86_64__)
  bias_gelu_forward(call);
#endif
}

void backward_op(Tensor grad_x, Tensor bias_parts, Tensor grad, Tensor x, Tensor bias) {
  GeluCall call = call_of(x, bias);
  require(bias_parts.sizes().size() == 2 && bias_parts.sizes()[0] > 0, "bias_parts must have shape [parts, ",
          call.columns, "] with a part or more, got ", listed(bias_parts.sizes()));
  call.parts = bias_parts.sizes()[0];
  call.grad = static_cast<const bf16*>(data_of("grad", grad, ScalarType::BFloat16, x.numel()));
  call.grad_x = static_cast<bf16*>(data_of("grad_x", grad_x, ScalarType::BFloat16, x.numel()));
  call.bias_parts =
      static_cast<float*>(data_of("bias_parts", bias_parts, ScalarType::Float, call.parts * call.columns));
#if defined(__x86_64__)
  bias_gelu_backward(call);
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vitrail_C, m) {
  m.def("bias_gelu_out(Tensor(a!) out, Tensor x, Tensor bias) -> ()");
  m.def("bias_gelu_backward_out(Tensor(a!) grad_x, Tensor(b!) bias_parts, Tensor grad, Tensor x, Tensor bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vitrail_C, CPU, m) {
  m.impl("bias_gelu_out", TORCH_BOX(&forward_op));
  m.impl("bias_gelu_backward_out", TORCH_BOX(&backward_op));
}

}  // namespace vitrail
