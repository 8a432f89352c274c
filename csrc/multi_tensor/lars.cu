#include "backends.h"
#include "cuda.cuh"

namespace vitrail {

void lars_cuda(const LarsCall& call, void* stream) { lars(Cuda(stream), call); }

}  // namespace vitrail
