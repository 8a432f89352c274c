#include "backends.h"
#include "cuda.cuh"

namespace vitrail {

void ema_cuda(const EmaCall& call, void* stream) { ema(Cuda(stream), call); }

}  // namespace vitrail
