// Euclidean norms of every tensor and of all together, and the scaling that clips by them.
#pragma once

#include "lists.h"

namespace vitrail {

struct NormCall {
  Groups groups;         // one stream
  int64_t count;         // tensors
  const int64_t* sizes;  // of all tensors, in the caller's order
  float* partials;       // one for each chunk
  double* sums;          // one for each tensor, and one more for the total
  float* norms;          // one for each tensor
  float* total;
  float* found_inf;  // 1 if the total is not finite
};

struct ScaleCall {
  Groups groups;        // one stream
  const float* scales;  // one for each tensor, or one for all
  bool one_for_all;
};

struct NoCoefficients {
  bool skip;
};

template <class T>
struct SumOfSquares {
  using Streams = Types<T>;
  using Coefficients = NoCoefficients;
  static constexpr unsigned kReads = 0b1, kWrites = 0;
  static constexpr int kSums = 1;

  VITRAIL_HD Coefficients coefficients(int) const { return {false}; }

  VITRAIL_HD void operator()(float* x, const Coefficients&, float* sums) const { sums[0] = fma(x[0], x[0], sums[0]); }
};

struct FinishNorms {
  const double* sums;
  float* norms;
  float* total;
  float* found_inf;
  int count;

  VITRAIL_HD void operator()(int i) const {
    const float norm = float(sqrt(sums[i]));
    if (i < count) {
      norms[i] = norm;
    } else {  // behind the tensors' sums stands the total
      *total = norm;
      *found_inf = norm - norm == 0.0f ? 0.0f : 1.0f;
    }
  }
};

struct ScaleCoefficients {
  float scale;
  bool skip;
};

template <class T>
struct Scale {
  using Streams = Types<T>;
  using Coefficients = ScaleCoefficients;
  static constexpr unsigned kReads = 0b1, kWrites = 0b1;
  static constexpr int kSums = 0;

  const float* scales;
  bool one_for_all;

  VITRAIL_HD Coefficients coefficients(int tensor) const {
    const float scale = scales[one_for_all ? 0 : tensor];
    return {scale, scale == 1.0f};  // most gradients are within the limit: they need not be read
  }

  VITRAIL_HD void operator()(float* x, const Coefficients& c, float*) const { x[0] *= c.scale; }
};

template <class Executor>
void norm(const Executor& executor, const NormCall& call) {
  for (int64_t g = 0; g < call.groups.count; ++g) {
    const Group& group = call.groups.groups[g];
    with_type(group.bf16 & 1, [&](auto type) {
      executor.visit(group.lists, SumOfSquares<decltype(type)>{}, call.partials);
    });
  }
  executor.template reduce<1>(call.count, call.sizes, call.partials, call.sums);
  executor.total(call.count, call.sums, call.sums + call.count);
  executor.each(call.count + 1, FinishNorms{call.sums, call.norms, call.total, call.found_inf, int(call.count)});
}

template <class Executor>
void scale(const Executor& executor, const ScaleCall& call) {
  for (int64_t g = 0; g < call.groups.count; ++g) {
    const Group& group = call.groups.groups[g];
    with_type(group.bf16 & 1, [&](auto type) {
      executor.visit(group.lists, Scale<decltype(type)>{call.scales, call.one_for_all});
    });
  }
}

}  // namespace vitrail
