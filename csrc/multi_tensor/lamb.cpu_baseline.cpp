// LAMB for any CPU.
#define VITRAIL_LEVEL baseline
#include "cpu.h"
#include "lamb.h"

namespace vitrail {

void lamb_baseline(const LambCall& call) { lamb(VITRAIL_LEVEL::Cpu(), call); }

}  // namespace vitrail
