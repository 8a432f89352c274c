#include "backends.h"
#include "cuda.cuh"

namespace vitrail {

void norm_cuda(const NormCall& call, void* stream) { norm(Cuda(stream), call); }

void scale_cuda(const ScaleCall& call, void* stream) { scale(Cuda(stream), call); }

}  // namespace vitrail
