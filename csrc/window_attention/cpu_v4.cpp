// Window attention for CPUs with AVX-512.
//
// What comes from elsewhere is included before the pragma: its inline functions may be shared with the other files.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "attention.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("arch=x86-64-v4")
#define VITRAIL_LEVEL v4
#define VITRAIL_LANES 16
#include "cpu.h"

namespace vitrail {

void attention_forward_v4(const AttentionCall& call) { v4::attention<v4::Forward>(call); }

void attention_backward_v4(const AttentionCall& call) { v4::attention<v4::Backward>(call); }

}  // namespace vitrail
#endif
