// Attention of whole images on the CPU, in bfloat16: what a call holds.
#pragma once

#include "../portable.h"

namespace vitrail {

// Tokens [B, N, heads, width] whose channels are adjacent, head after head; strides in elements.
struct Tokens {
  bf16* data;
  int64_t image, token;

  bf16* of(int64_t image_number, int64_t head, int64_t width) const {
    return data + image_number * image + head * width;
  }
};

struct AttentionOfTokens {
  Tokens q, k, v;
  Tokens out;                          // forward alone
  Tokens grad, grad_q, grad_k, grad_v;  // backward alone
  int64_t batch, heads, width;
  int64_t queries, keys;
  float scale;
};

void attention_of_tokens_forward(const AttentionOfTokens& call);
void attention_of_tokens_backward(const AttentionOfTokens& call);

}  // namespace vitrail
