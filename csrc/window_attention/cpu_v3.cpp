// Window attention for CPUs with AVX2 and FMA.
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

#pragma GCC target("arch=x86-64-v3")
#define VITRAIL_LEVEL v3
#define VITRAIL_LANES 8
#include "cpu.h"

namespace vitrail {

void attention_forward_v3(const AttentionCall& call) { v3::attention<v3::Forward>(call); }

void attention_backward_v3(const AttentionCall& call) { v3::attention<v3::Backward>(call); }

}  // namespace vitrail
#endif
