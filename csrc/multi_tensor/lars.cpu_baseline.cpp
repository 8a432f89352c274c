// LARS for any CPU.
#define VITRAIL_LEVEL baseline
#include "cpu.h"
#include "lars.h"

namespace vitrail {

void lars_baseline(const LarsCall& call) { lars(VITRAIL_LEVEL::Cpu(), call); }

}  // namespace vitrail
