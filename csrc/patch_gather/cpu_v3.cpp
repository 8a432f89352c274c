// Patch gather for CPUs with AVX2 and FMA. On other architectures this is the baseline again.
//
// What comes from elsewhere is included before the pragma: its inline functions may be shared with the other files.
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#pragma GCC target("arch=x86-64-v3")
#endif

#define VITRAIL_LEVEL v3
#include "cpu.h"

namespace vitrail {

void gather_v3(const GatherCall& call, const GatherKind& kind) { VITRAIL_LEVEL::gather(call, kind); }

}  // namespace vitrail
