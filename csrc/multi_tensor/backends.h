// Where each operation over lists is compiled: the same templates for the GPU and for two levels of x86 instructions.
#pragma once

#include "adamw.h"
#include "ema.h"
#include "lamb.h"
#include "lars.h"
#include "norm.h"

namespace vitrail {

// X(operation, arguments)
#define VITRAIL_MULTI_TENSOR(X) \
  X(ema, EmaCall)               \
  X(norm, NormCall)             \
  X(scale, ScaleCall)           \
  X(adamw, AdamWCall)           \
  X(lars, LarsCall)             \
  X(lamb, LambCall)

#define VITRAIL_DECLARE(operation, Call)     \
  void operation##_baseline(const Call& call); \
  void operation##_v3(const Call& call);       \
  void operation##_cuda(const Call& call, void* stream);
VITRAIL_MULTI_TENSOR(VITRAIL_DECLARE)
#undef VITRAIL_DECLARE

}  // namespace vitrail
