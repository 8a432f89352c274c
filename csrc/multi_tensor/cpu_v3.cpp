// The operations over lists for CPUs with AVX2 and FMA. On other architectures this is the baseline again.
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
#include "backends.h"
#include "cpu.h"

namespace vitrail {

#define VITRAIL_DEFINE(operation, Call) \
  void operation##_v3(const Call& call) { operation(VITRAIL_LEVEL::Cpu(), call); }
VITRAIL_MULTI_TENSOR(VITRAIL_DEFINE)

}  // namespace vitrail
