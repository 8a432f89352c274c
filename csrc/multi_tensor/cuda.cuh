// The CUDA executor: the operations over lists as kernels whose arguments carry the pointers.
//
// Nothing is copied to the device for a launch, so that a CUDA graph may capture it; nothing is read back.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "lists.h"

namespace vitrail {

constexpr int kArgumentBytes = 32'764;  // of a kernel, on compute capability 7.0 and newer
constexpr int kReservedBytes = 1'024;   // for the operation itself

inline void check_launch() {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("vitrail: CUDA says ") + cudaGetErrorString(error));
}

// The part of the lists that one launch visits.
template <int kStreams>
struct Table {
  static constexpr int kTensors = (kArgumentBytes - kReservedBytes) / (8 * kStreams + 8 + 3 * 4);
  void* pointers[kStreams][kTensors];
  int64_t sizes[kTensors];
  int32_t indices[kTensors];
  int32_t first_partials[kTensors];
  int32_t first_chunks[kTensors];  // of the launch
  int32_t count;
};

template <class T>
struct alignas(16) Pack16 {
  T values[16 / sizeof(T)];
};

// Reads kPack elements: by 16 bytes, or those below `count` one by one.
template <bool kWide, class T>
__device__ __forceinline__ void load(const T* source, int count, float (&x)[kPack]) {
  constexpr int kValues = 16 / sizeof(T);
  if constexpr (kWide) {
#pragma unroll
    for (int part = 0; part < kPack / kValues; ++part) {
      const auto pack = reinterpret_cast<const Pack16<T>*>(source)[part];
#pragma unroll
      for (int i = 0; i < kValues; ++i) x[part * kValues + i] = to_float(pack.values[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPack; ++i) x[i] = i < count ? to_float(source[i]) : 0.0f;
  }
}

template <bool kWide, class T>
__device__ __forceinline__ void store(T* target, int count, const float (&x)[kPack]) {
  constexpr int kValues = 16 / sizeof(T);
  if constexpr (kWide) {
#pragma unroll
    for (int part = 0; part < kPack / kValues; ++part) {
      Pack16<T> pack;
#pragma unroll
      for (int i = 0; i < kValues; ++i) pack.values[i] = from_float<T>(x[part * kValues + i]);
      reinterpret_cast<Pack16<T>*>(target)[part] = pack;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPack; ++i)
      if (i < count) target[i] = from_float<T>(x[i]);
  }
}

template <bool kWide, class Op, size_t... S>
__device__ __forceinline__ void visit_pack(const Op& op, const typename Op::Coefficients& coefficients,
                                           void* const (&streams)[Traits<Op>::kStreams], int64_t offset, int count,
                                           float (&sums)[Traits<Op>::kSlots][kPack], std::index_sequence<S...>) {
  using Trait = Traits<Op>;
  float x[Trait::kStreams][kPack];
  ((Trait::reads(S) ? load<kWide>(static_cast<const typename Trait::template Type<S>*>(streams[S]) + offset, count, x[S])
                    : void()),
   ...);
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    if (kWide || i < count) {
      float element[Trait::kStreams] = {(Trait::reads(S) ? x[S][i] : 0.0f)...};
      float sum[Trait::kSlots];
#pragma unroll
      for (int s = 0; s < Op::kSums; ++s) sum[s] = sums[s][i];
      op(element, coefficients, sum);
#pragma unroll
      for (int s = 0; s < Op::kSums; ++s) sums[s][i] = sum[s];
      ((x[S][i] = element[S]), ...);
    }
  }
  ((Trait::writes(S) ? store<kWide>(static_cast<typename Trait::template Type<S>*>(streams[S]) + offset, count, x[S])
                     : void()),
   ...);
}

// Adds one value of every thread of the block, in a fixed order; the result is thread 0's.
template <class Number>
__device__ __forceinline__ Number block_sum(Number value) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ Number warps[kWarps];
#pragma unroll
  for (int half = kWarp / 2; half > 0; half /= 2) value += __shfl_down_sync(0xFFFFFFFF, value, half);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  if (threadIdx.x < kWarp) {
    value = threadIdx.x < kWarps ? warps[threadIdx.x] : Number(0);
#pragma unroll
    for (int half = kWarps / 2; half > 0; half /= 2) value += __shfl_down_sync(0xFFFFFFFF, value, half);
  }
  __syncthreads();  // `warps` may be used again
  return value;
}

template <class Op, size_t... S>
__device__ __forceinline__ void visit_chunk(const Table<Traits<Op>::kStreams>& table, const Op& op, float* partials,
                                            std::index_sequence<S...> indices) {
  const int chunk = blockIdx.x;
  int tensor = 0;  // the last one whose first chunk is not beyond this one
  for (int above = table.count; above - tensor > 1;) {
    const int middle = (tensor + above) / 2;
    if (table.first_chunks[middle] <= chunk) {
      tensor = middle;
    } else {
      above = middle;
    }
  }
  const auto coefficients = op.coefficients(table.indices[tensor]);
  if (coefficients.skip) return;
  void* const streams[] = {table.pointers[S][tensor]...};
  const int within = chunk - table.first_chunks[tensor];
  const int64_t offset = int64_t(within) * kChunk, left = table.sizes[tensor] - offset;
  const int count = int(left < kChunk ? left : kChunk);
  const bool aligned = ((reinterpret_cast<uintptr_t>(streams[S]) | ...) & 15) == 0;
  float sums[Traits<Op>::kSlots][kPack] = {};
  for (int i = threadIdx.x * kPack; i < count; i += kRow) {
    if (aligned && i + kPack <= count) {
      visit_pack<true>(op, coefficients, streams, offset + i, kPack, sums, indices);
    } else {
      visit_pack<false>(op, coefficients, streams, offset + i, count - i, sums, indices);
    }
  }
#pragma unroll
  for (int s = 0; s < Op::kSums; ++s) {
    const float sum = block_sum(pack_sum(sums[s]));
    if (threadIdx.x == 0) partials[(table.first_partials[tensor] + within) * Op::kSums + s] = sum;
  }
}

// At least three blocks to a multiprocessor: some load while others compute.
template <class Op>
__global__ void __launch_bounds__(kThreads, 3)
    visit_kernel(const __grid_constant__ Table<Traits<Op>::kStreams> table, const __grid_constant__ Op op,
                 float* partials) {
  visit_chunk(table, op, partials, typename Traits<Op>::Indices{});
}

template <class Function>
__global__ void __launch_bounds__(kThreads) each_kernel(const __grid_constant__ Function function, int count) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i < count) function(i);
}

// Chunk counts of consecutive tensors, one block each.
struct ChunkTable {
  static constexpr int kTensors = (kArgumentBytes - kReservedBytes) / 4;
  int32_t first_chunks[kTensors + 1];
};

template <int kSums>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const __grid_constant__ ChunkTable table, const float* partials, double* sums) {
  const int begin = table.first_chunks[blockIdx.x], end = table.first_chunks[blockIdx.x + 1];
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    double lane = 0;
    for (int chunk = begin + threadIdx.x; chunk < end; chunk += kThreads) lane += partials[int64_t(chunk) * kSums + s];
    const double sum = block_sum(lane);
    if (threadIdx.x == 0) sums[blockIdx.x * kSums + s] = sum;
  }
}

static __global__ void __launch_bounds__(kThreads) total_kernel(int64_t count, const double* values, double* total) {
  double lane = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) lane += values[i];
  const double sum = block_sum(lane);
  if (threadIdx.x == 0) *total = sum;
}

class Cuda {
 public:
  explicit Cuda(void* stream) : stream_(static_cast<cudaStream_t>(stream)) {}

  // As Cpu::visit.
  template <class Op>
  void visit(const Lists& lists, const Op& op, float* partials = nullptr) const {
    constexpr int kStreams = Traits<Op>::kStreams;
    static_assert(sizeof(Op) + sizeof(float*) + 64 <= kReservedBytes, "the operation outgrew its share of the arguments");
    Table<kStreams> table;
    table.count = 0;
    int64_t chunks = 0;
    const auto flush = [&] {
      if (chunks > 0) {
        visit_kernel<Op><<<unsigned(chunks), kThreads, 0, stream_>>>(table, op, partials);
        check_launch();
      }
      table.count = 0;
      chunks = 0;
    };
    for (int64_t t = 0; t < lists.count; ++t) {
      const int64_t added = chunks_of(lists.sizes[t]);
      if (added == 0) continue;
      if (table.count == Table<kStreams>::kTensors || chunks + added > INT32_MAX) flush();
      const int slot = table.count++;
      for (int s = 0; s < kStreams; ++s) table.pointers[s][slot] = lists.pointers[s][t];
      table.sizes[slot] = lists.sizes[t];
      table.indices[slot] = lists.indices[t];
      table.first_partials[slot] = lists.first_partials ? lists.first_partials[t] : 0;
      table.first_chunks[slot] = int32_t(chunks);
      chunks += added;
    }
    flush();
  }

  // As Cpu::each.
  template <class Function>
  void each(int64_t count, const Function& function) const {
    if (count == 0) return;
    each_kernel<<<unsigned((count + kThreads - 1) / kThreads), kThreads, 0, stream_>>>(function, int(count));
    check_launch();
  }

  // As Cpu::reduce.
  template <int kSums>
  void reduce(int64_t count, const int64_t* sizes, const float* partials, double* sums) const {
    ChunkTable table;
    for (int64_t first = 0; first < count; first += ChunkTable::kTensors) {
      const int64_t part = count - first < ChunkTable::kTensors ? count - first : ChunkTable::kTensors;
      table.first_chunks[0] = 0;
      for (int64_t t = 0; t < part; ++t)
        table.first_chunks[t + 1] = table.first_chunks[t] + int32_t(chunks_of(sizes[first + t]));
      reduce_kernel<kSums><<<unsigned(part), kThreads, 0, stream_>>>(table, partials, sums + first * kSums);
      check_launch();
      partials += int64_t(table.first_chunks[part]) * kSums;
    }
  }

  // As Cpu::total.
  void total(int64_t count, const double* values, double* total) const {
    total_kernel<<<1, kThreads, 0, stream_>>>(count, values, total);
    check_launch();
  }

 private:
  cudaStream_t stream_;
};

}  // namespace vitrail
