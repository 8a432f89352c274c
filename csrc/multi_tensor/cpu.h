// The CPU executor: the operations over lists on PyTorch's thread pool.
//
// Compiled once for each level of instructions; VITRAIL_LEVEL is the namespace of this one.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "lists.h"

namespace vitrail {
namespace VITRAIL_LEVEL {

class Cpu {
 public:
  // Runs an operation over all chunks of the lists.
  template <class Op>
  void visit(const Lists& lists, const Op& op, float* partials = nullptr) const {
    int64_t chunks = 0, elements = 0;
    for (int64_t t = 0; t < lists.count; ++t) {
      chunks += chunks_of(lists.sizes[t]);
      elements += lists.sizes[t];
    }
    if (chunks == 0) return;
    // Waking other threads takes as long as some hundred thousand elements.
    const int64_t grain = 1 + (chunks * kChunk) / (elements + 1);
    torch::stable::parallel_for(0, chunks, elements < kSerial ? chunks : grain, [&](int64_t begin, int64_t end) {
      int64_t tensor = 0, first = 0;  // the tensor that holds chunk `begin`, and its first chunk
      while (first + chunks_of(lists.sizes[tensor]) <= begin) first += chunks_of(lists.sizes[tensor++]);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        while (first + chunks_of(lists.sizes[tensor]) <= chunk) first += chunks_of(lists.sizes[tensor++]);
        run(lists, tensor, chunk - first, op, partials, typename Traits<Op>::Indices{});
      }
    });
  }

  // Calls a function for each of `count` tensors.
  template <class Function>
  void each(int64_t count, const Function& function) const {
    for (int64_t i = 0; i < count; ++i) function(int(i));
  }

  // Adds the chunks' partial sums, [chunks, kSums], into sums, [tensors, kSums], for tensors of these sizes.
  template <int kSums>
  void reduce(int64_t count, const int64_t* sizes, const float* partials, double* sums) const {
    for (int64_t t = 0; t < count; ++t) {
      const int64_t chunks = chunks_of(sizes[t]);
      for (int s = 0; s < kSums; ++s) {
        double lanes[kThreads] = {};
        for (int64_t chunk = 0; chunk < chunks; ++chunk) lanes[chunk % kThreads] += partials[chunk * kSums + s];
        sums[t * kSums + s] = tree(lanes);
      }
      partials += chunks * kSums;
    }
  }

  // Returns in `total` the sum of `count` values.
  void total(int64_t count, const double* values, double* total) const {
    double lanes[kThreads] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i % kThreads] += values[i];
    *total = tree(lanes);
  }

 private:
  static constexpr int64_t kSerial = 1 << 18;

  // Adds one value of every thread in the order in which a block of the GPU does: halves of a warp onto each other, then
  // halves of the row of warps.
  template <class Number>
  static Number tree(Number (&lanes)[kThreads]) {
    constexpr int kWarps = kThreads / kWarp;
    Number warps[kWarps];
    for (int w = 0; w < kWarps; ++w) {
      Number* lane = lanes + w * kWarp;
      for (int half = kWarp / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
      warps[w] = lane[0];
    }
    for (int half = kWarps / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) warps[i] += warps[i + half];
    return warps[0];
  }

  template <class Op, size_t... S>
  static void run(const Lists& lists, int64_t tensor, int64_t chunk, const Op& op, float* partials,
                  std::index_sequence<S...>) {
    const auto coefficients = op.coefficients(lists.indices[tensor]);
    if (coefficients.skip) return;
    const int64_t offset = chunk * kChunk, left = lists.sizes[tensor] - offset;
    const int count = int(left < kChunk ? left : kChunk);
    elements(op, coefficients, count, partials ? partials + (lists.first_partials[tensor] + chunk) * Op::kSums : nullptr,
             static_cast<typename Traits<Op>::template Type<S>*>(lists.pointers[S][tensor]) + offset...);
  }

  template <class Op, class... T>
  static void elements(const Op& op, const typename Op::Coefficients& coefficients, int count, float* partials,
                       T* __restrict... streams) {
    if constexpr (Op::kSums == 0) {
#pragma GCC ivdep
      for (int i = 0; i < count; ++i) {
        float none[1];
        element(op, coefficients, none, i, typename Traits<Op>::Indices{}, streams...);
      }
    } else {
      float lanes[Op::kSums][kRow] = {};
      for (int row = 0; row < count; row += kRow) {
        const int width = count - row < kRow ? count - row : kRow;
#pragma GCC ivdep
        for (int j = 0; j < width; ++j) {
          float sums[Op::kSums];
          for (int s = 0; s < Op::kSums; ++s) sums[s] = lanes[s][j];
          // Indexed by j alone: of `row + j`, which may wrap, GCC makes gathers.
          element(op, coefficients, sums, j, typename Traits<Op>::Indices{}, (streams + row)...);
          for (int s = 0; s < Op::kSums; ++s) lanes[s][j] = sums[s];
        }
      }
      for (int s = 0; s < Op::kSums; ++s) partials[s] = block_sum(lanes[s]);
    }
  }

  template <class Op, size_t... S, class... T>
  VITRAIL_HD static void element(const Op& op, const typename Op::Coefficients& coefficients, float* sums, int i,
                                 std::index_sequence<S...>, T* __restrict... streams) {
    float x[Traits<Op>::kStreams];
    ((x[S] = Traits<Op>::reads(S) ? to_float(streams[i]) : 0.0f), ...);
    op(x, coefficients, sums);
    ((Traits<Op>::writes(S) ? void(streams[i] = from_float<T>(x[S])) : void()), ...);
  }

  // Adds a row of lanes: the kPack of a thread pairwise, then the threads.
  static float block_sum(const float (&lanes)[kRow]) {
    float threads[kThreads];
    for (int t = 0; t < kThreads; ++t) threads[t] = pack_sum(lanes + t * kPack);
    return tree(threads);
  }
};

}  // namespace VITRAIL_LEVEL
}  // namespace vitrail
