#include "backends.h"
#include "cuda.cuh"

namespace vitrail {

void adamw_cuda(const AdamWCall& call, void* stream) { adamw(Cuda(stream), call); }

}  // namespace vitrail
