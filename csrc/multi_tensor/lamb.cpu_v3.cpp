// LAMB for CPUs with AVX2 and FMA. On other architectures this is the baseline again.
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
#include "lamb.h"

namespace vitrail {

void lamb_v3(const LambCall& call) { lamb(VITRAIL_LEVEL::Cpu(), call); }

}  // namespace vitrail
