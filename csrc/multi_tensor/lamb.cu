#include "backends.h"
#include "cuda.cuh"

namespace vitrail {

void lamb_cuda(const LambCall& call, void* stream) { lamb(Cuda(stream), call); }

}  // namespace vitrail
