// LARS for CPUs with AVX2 and FMA. On other architectures this is the baseline again.
//
// What comes from elsewhere is included before the pragma: its inline functions may be shared with the other files.
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#pragma GCC target("arch=x86-64-v3")
#endif

#define VITRAIL_LEVEL v3
#include "cpu.h"
#include "lars.h"

namespace vitrail {

void lars_v3(const LarsCall& call) { lars(VITRAIL_LEVEL::Cpu(), call); }

}  // namespace vitrail
