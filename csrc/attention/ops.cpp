// Attention of whole images as ops of PyTorch, for the CPU.
#include "../checks.h"
#include "attention.h"

namespace vitrail {
namespace {

// Tokens [B, N, heads, width]; negative sizes are anyone's.
Tokens tokens_of(const std::string& name, const Tensor& tensor, int64_t batch, int64_t count, int64_t heads,
                 int64_t width) {
  check_type(name, tensor, ScalarType::BFloat16);
  require(tensor.device().is_cpu(), name, " is on ", name_of(tensor.device()), "; this op is for the CPU");
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  require(sizes.size() == 4 && sizes[0] == batch && sizes[1] == count && sizes[2] == heads && sizes[3] == width, name,
          " must have shape [", batch, ", ", count, ", ", heads, ", ", width, "], got ", listed(sizes));
  // 32 bits at a time are read.
  require(strides[3] == 1 && (heads == 1 || strides[2] == width) && strides[1] % 2 == 0 && strides[0] % 2 == 0 &&
              reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 4 == 0,
          name, " has strides ", listed(strides), ", expected adjacent heads and even strides of tokens and images");
  return {static_cast<bf16*>(tensor.data_ptr()), strides[0], strides[1]};
}

AttentionOfTokens call_of(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  require(has_avx512_bf16(), "this CPU has no AVX-512 with BF16; use another implementation");
  AttentionOfTokens call{};
  const auto sizes = q.sizes();
  require(sizes.size() == 4 && k.sizes().size() == 4, "q and k must have shape [B, N, heads, width], got ",
          listed(sizes), " and ", listed(k.sizes()));
  call.batch = sizes[0];
  call.queries = sizes[1];
  call.heads = sizes[2];
  call.width = sizes[3];
  call.keys = k.sizes()[1];
  call.scale = float(scale);
  require(call.width > 0 && call.width % 16 == 0, "heads are ", call.width, " wide; the op takes multiples of 16");
  require(call.keys > 0, "there are no keys to attend to");
  call.q = tokens_of("q", q, call.batch, call.queries, call.heads, call.width);
  call.k = tokens_of("k", k, call.batch, call.keys, call.heads, call.width);
  call.v = tokens_of("v", v, call.batch, call.keys, call.heads, call.width);
  return call;
}

void forward_op(Tensor out, Tensor q, Tensor k, Tensor v, double scale) {
  AttentionOfTokens call = call_of(q, k, v, scale);
  call.out = tokens_of("out", out, call.batch, call.queries, call.heads, call.width);
#if defined(__x86_64__)
  attention_of_tokens_forward(call);
#endif
}

void backward_op(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad, Tensor q, Tensor k, Tensor v,
                 double scale) {
  AttentionOfTokens call = call_of(q, k, v, scale);
  call.grad = tokens_of("grad", grad, call.batch, call.queries, call.heads, call.width);
  call.grad_q = tokens_of("grad_q", grad_q, call.batch, call.queries, call.heads, call.width);
  call.grad_k = tokens_of("grad_k", grad_k, call.batch, call.keys, call.heads, call.width);
  call.grad_v = tokens_of("grad_v", grad_v, call.batch, call.keys, call.heads, call.width);
#if defined(__x86_64__)
  attention_of_tokens_backward(call);
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vitrail_C, m) {
  m.def("attention_out(Tensor(a!) out, Tensor q, Tensor k, Tensor v, float scale) -> ()");
  m.def(
      "attention_backward_out(Tensor(a!) grad_q, Tensor(b!) grad_k, Tensor(c!) grad_v, Tensor grad, Tensor q, Tensor k, "
      "Tensor v, float scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vitrail_C, CPU, m) {
  m.impl("attention_out", TORCH_BOX(&forward_op));
  m.impl("attention_backward_out", TORCH_BOX(&backward_op));
}

}  // namespace vitrail
