// Patch gather on the GPU: a warp for each patch, which loads its windows into shared memory and writes whole octets.
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "gather.h"

namespace vitrail {
namespace {

constexpr unsigned kWarp = 32, kWarps = 4;  // lanes of a warp, warps of a block

__device__ __forceinline__ uint32_t pack(Tag<bf16>, float first, float second) {
  return bit_cast<uint32_t>(__floats2bfloat162_rn(first, second));
}

__device__ __forceinline__ uint32_t pack(Tag<half>, float first, float second) {
  return bit_cast<uint32_t>(__floats2half2_rn(first, second));
}

// Eight results as the words to store.
template <class T>
struct Packed {
  static constexpr unsigned kWords = kOctet * sizeof(T) / 4;
  uint32_t words[kWords];

  __device__ __forceinline__ explicit Packed(const float (&values)[kOctet]) {
#pragma unroll
    for (unsigned i = 0; i < kWords; ++i) {
      if constexpr (sizeof(T) == 4) {
        words[i] = bit_cast<uint32_t>(values[i]);
      } else {
        words[i] = pack(Tag<T>{}, values[2 * i], values[2 * i + 1]);
      }
    }
  }

  // Stores the first `count` results with stores as wide as the rows' alignment allows; kWide promises 16 bytes.
  template <bool kWide>
  __device__ __forceinline__ void store(T* target, unsigned alignment, int64_t count) const {
    if (kWide) {
      store_by<uint4>(target, count);
    } else if (alignment >= 8) {
      store_by<uint2>(target, count);
    } else if (alignment >= 4) {
      store_by<uint32_t>(target, count);
    } else {
      store_by<uint16_t>(target, count);
    }
  }

 private:
  // A row holds a whole number of Parts, so that a part is inside it or outside.
  template <class Part>
  __device__ __forceinline__ void store_by(T* target, int64_t count) const {
    if constexpr (sizeof(Part) >= sizeof(T)) {
      constexpr unsigned kParts = kOctet * sizeof(T) / sizeof(Part), kValues = sizeof(Part) / sizeof(T);
#pragma unroll
      for (unsigned i = 0; i < kParts; ++i)
        if (i * kValues < count) reinterpret_cast<Part*>(target)[i] = part<Part>(i);
    }
  }

  template <class Part>
  __device__ __forceinline__ Part part(unsigned i) const {
    if constexpr (sizeof(Part) == 16) {
      return make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
    } else if constexpr (sizeof(Part) == 8) {
      return make_uint2(words[2 * i], words[2 * i + 1]);
    } else if constexpr (sizeof(Part) == 4) {
      return words[i];
    } else {
      return uint16_t(words[i / 2] >> 16 * (i % 2));
    }
  }
};

// Copies the windows of a patch into the stage. All are under way at once, and none waits in a register.
template <class Patch>
__device__ __forceinline__ void load_windows(const Patch& patch, unsigned lane, uint4* stage) {
#pragma unroll
  for (unsigned first = 0; first < Patch::kItems; first += kWarp) {
    const unsigned item = first + lane;
    const uint8_t* source = item < Patch::kItems ? patch.window(item) : nullptr;
    if (source) __pipeline_memcpy_async(stage + item, source, kWindow);
  }
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncwarp();
}

// Writes the values of a staged patch.
template <bool kWide, class Patch, class T>
__device__ __forceinline__ void write_values(const Patch& patch, const uint32_t* stage, unsigned lane,
                                             const GatherCall& call, T* out, unsigned alignment) {
  // The channel of a lane's first value, and with it every constant, moves on by one from octet to octet.
  static_assert(kWarp * kOctet % 3 == 1);
  Affine affine(call, lane * kOctet % 3);
#pragma unroll
  for (unsigned n = lane; n < Patch::kOctets; n += kWarp) {
    const Octet octet = patch.octet(stage, n);
    float values[kOctet];
#pragma unroll
    for (unsigned i = 0; i < kOctet; ++i) {
      const uint32_t byte = (i < 4 ? octet.low : octet.high) >> 8 * (i % 4) & 0xFF;
      const float value = normalise(byte, affine.scale[i % 3], affine.shift[i % 3]);
      values[i] = Patch::kWithinRows || n * kOctet + i < Patch::kValues ? value : 0.0f;
    }
    const int64_t count = Patch::kWithinRows ? int64_t(kOctet) : call.columns - n * kOctet;
    Packed<T>(values).template store<kWide>(out + n * kOctet, alignment, count);
    affine.advance();
  }
}

template <class Patch, class T, bool kWide>
__global__ void __launch_bounds__(kWarp* kWarps)
    gather_kernel(const __grid_constant__ GatherCall call, unsigned alignment) {
  __shared__ uint4 stages[kWarps][Patch::kStage / kWindow];
  const unsigned warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const uint32_t row = blockIdx.x * kWarps + warp;
  if (row >= call.rows) return;
  const uint32_t sample = row / uint32_t(call.count), slot = row % uint32_t(call.count);
  const int64_t index = __ldg(call.indices + sample * call.index_stride + slot);
  T* out = static_cast<T*>(call.out) + row * call.columns;
  unsigned written = 0;  // octets
  if (index >= 0 && index < call.patches) {
    const Patch patch(call, sample, int32_t(index));
    load_windows(patch, lane, stages[warp]);
    write_values<kWide>(patch, reinterpret_cast<const uint32_t*>(stages[warp]), lane, call, out, alignment);
    written = Patch::kOctets;
  }
  const float zeros[kOctet] = {};
  for (int64_t column = int64_t(written + lane) * kOctet; column < call.columns; column += kWarp * kOctet)
    Packed<T>(zeros).template store<kWide>(out + column, alignment, call.columns - column);
}

}  // namespace

void gather_cuda(const GatherCall& call, const GatherKind& kind, void* stream) {
  const unsigned blocks = unsigned((call.rows + kWarps - 1) / kWarps);
  with_types(kind, [&](auto patch, auto output) {
    using T = typename decltype(output)::Type;
    const uint64_t bits = reinterpret_cast<uintptr_t>(call.out) | uint64_t(call.columns) * sizeof(T) | kWindow;
    const auto alignment = unsigned(bits & -bits);  // of every row: the lowest bit set
    const auto kernel = alignment == kWindow ? gather_kernel<typename decltype(patch)::Type, T, true>
                                             : gather_kernel<typename decltype(patch)::Type, T, false>;
    kernel<<<blocks, kWarp * kWarps, 0, static_cast<cudaStream_t>(stream)>>>(call, alignment);
  });
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("vitrail_C: CUDA says ") + cudaGetErrorString(error));
}

}  // namespace vitrail
