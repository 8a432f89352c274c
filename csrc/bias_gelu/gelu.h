// A bias and GELU on the CPU, in bfloat16: what a call holds.
#pragma once

#include "../portable.h"

namespace vitrail {

struct GeluCall {
  const bf16* x;      // [rows, columns], contiguous, and so are the others
  const float* bias;  // [columns]
  bf16* out;          // forward alone
  const bf16* grad;   // backward alone, and so are the following
  bf16* grad_x;
  float* bias_parts;  // [parts, columns]: what each part of the rows adds to the gradient of the bias
  int64_t rows, columns, parts;

  VITRAIL_HD int64_t first_row(int64_t part) const { return rows * part / parts; }
};

void bias_gelu_forward(const GeluCall& call);
void bias_gelu_backward(const GeluCall& call);

}  // namespace vitrail
