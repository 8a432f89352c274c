// The operations over lists for any CPU.
#define VITRAIL_LEVEL baseline
#include "backends.h"
#include "cpu.h"

namespace vitrail {

#define VITRAIL_DEFINE(operation, Call) \
  void operation##_baseline(const Call& call) { operation(VITRAIL_LEVEL::Cpu(), call); }
VITRAIL_MULTI_TENSOR(VITRAIL_DEFINE)

}  // namespace vitrail
