// Patch gather for any CPU.
#define VITRAIL_LEVEL baseline
#include "cpu.h"

namespace vitrail {

void gather_baseline(const GatherCall& call, const GatherKind& kind) { VITRAIL_LEVEL::gather(call, kind); }

}  // namespace vitrail
