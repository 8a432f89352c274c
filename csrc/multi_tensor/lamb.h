// LAMB: Adam whose update is scaled to the norm of each tensor's weights.
//
// Two passes: the moments are moved and norms taken, then the update is computed again from the moments as they are
// stored. The same update stored in between would be 12 bytes more for each element.
#pragma once

#include "lists.h"

namespace vitrail {

struct LambCoefficients {
  float unbias;      // 1 / (1 - beta1^step)
  float correction;  // sqrt(1 - beta2^step)
  float scale;       // of the gradient
  float step;        // -lr * ratio
  bool skip;
};

struct LambConstants {
  double beta1, beta2, weight_decay;
  float eps;
  bool averaging;  // multiply the gradient by 1 - beta1
  bool adapt;      // multiply the update by a trust ratio; without, the passes are the same
};

struct LambCall {
  Groups groups;  // streams: parameter, gradient, first and second moment
  int64_t count;
  const int64_t* sizes;
  float* const* steps;  // one for each tensor
  LambConstants constants;
  Scalar lr;
  const float* scales;  // of the gradients: null, one for all, or one for each
  bool one_for_all;
  const float* found_inf;
  float* partials;  // two for each chunk
  double* sums;     // two for each tensor
  LambCoefficients* coefficients;
};

// Counts the step of one tensor and works out what its elements need, for now with a ratio of one.
struct LambPrepare {
  static constexpr int kTensors = 1024;  // whose step counters one launch carries
  float* steps[kTensors];
  int first;
  double beta1, beta2;
  Scalar lr;
  const float* scales;
  bool one_for_all;
  const float* found_inf;
  LambCoefficients* coefficients;

  VITRAIL_HD void operator()(int i) const {
    const int tensor = first + i;
    LambCoefficients c{};
    c.skip = raised(found_inf);
    if (!c.skip) {
      const double step = *steps[i] + 1.0;
      *steps[i] = float(step);
      c.unbias = float(1.0 / (1.0 - pow(beta1, step)));
      c.correction = float(sqrt(1.0 - pow(beta2, step)));
      c.scale = scales ? scales[one_for_all ? 0 : tensor] : 1.0f;
      c.step = float(-lr.read());
    }
    coefficients[tensor] = c;
  }
};

struct LambTrust {
  Scalar lr;
  const double* sums;
  LambCoefficients* coefficients;

  VITRAIL_HD void operator()(int tensor) const {
    if (coefficients[tensor].skip) return;
    const double weight = sqrt(sums[2 * tensor]), update = sqrt(sums[2 * tensor + 1]);
    if (weight > 0.0 && update > 0.0) coefficients[tensor].step = float(-(lr.read() * (weight / update)));
  }
};

// The arithmetic of one element; `c` as above.
struct LambRule {
  float beta1, gain1, beta2, gain2, eps, decay;  // gain: 1 - beta

  VITRAIL_HD explicit LambRule(const LambConstants& constants)
      : beta1(float(constants.beta1)),
        gain1(float(1.0 - constants.beta1)),
        beta2(float(constants.beta2)),
        gain2(float(1.0 - constants.beta2)),
        eps(constants.eps),
        decay(float(constants.weight_decay)) {}

  // A branch on `kAveraging` at run time would keep the CPU's compiler from vectors.
  template <bool kAveraging>
  VITRAIL_HD void move(float grad, float& mean, float& square, const LambCoefficients& c) const {
    grad *= c.scale;
    mean = kAveraging ? lerp(mean, grad, gain1) : mean * beta1 + grad;
    square = fma(gain2 * grad, grad, square * beta2);
  }

  VITRAIL_HD float update(float param, float mean, float square, const LambCoefficients& c) const {
    const float denominator = square_root(square) / c.correction + eps;
    return param * decay + c.unbias * mean / denominator;
  }
};

// First pass: the moments, and squares of the weights and of the update.
template <class Param, class Grad, class Moment, bool kAveraging>
struct LambMoments {
  using Streams = Types<Param, Grad, Moment, Moment>;
  using Coefficients = LambCoefficients;
  static constexpr unsigned kReads = 0b1111, kWrites = 0b1100;
  static constexpr int kSums = 2;

  LambRule rule;
  const LambCoefficients* all;

  VITRAIL_HD Coefficients coefficients(int tensor) const { return all[tensor]; }

  VITRAIL_HD void operator()(float* x, const Coefficients& c, float* sums) const {
    rule.template move<kAveraging>(x[1], x[2], x[3], c);
    x[2] = to_float(from_float<Moment>(x[2]));  // the second pass reads them as they are stored
    x[3] = to_float(from_float<Moment>(x[3]));
    const float update = rule.update(x[0], x[2], x[3], c);
    sums[0] = fma(x[0], x[0], sums[0]);
    sums[1] = fma(update, update, sums[1]);
  }
};

// Second pass: the weights.
template <class Param, class Moment>
struct LambWeights {
  using Streams = Types<Param, Moment, Moment>;
  using Coefficients = LambCoefficients;
  static constexpr unsigned kReads = 0b111, kWrites = 0b001;
  static constexpr int kSums = 0;

  LambRule rule;
  const LambCoefficients* all;

  VITRAIL_HD Coefficients coefficients(int tensor) const { return all[tensor]; }

  VITRAIL_HD void operator()(float* x, const Coefficients& c, float*) const {
    x[0] = x[0] + c.step * rule.update(x[0], x[1], x[2], c);
  }
};

// Calls `function(parameter, gradient, moment, lists)` for each group, with values of the streams' types.
template <class Function>
void lamb_groups(const Groups& groups, const Function& function) {
  for (int64_t g = 0; g < groups.count; ++g) {
    const Group& group = groups.groups[g];
    with_type(group.bf16 & 1, [&](auto param) {
      with_type(group.bf16 >> 1 & 1, [&](auto grad) {
        with_type(group.bf16 >> 2 & 1, [&](auto moment) { function(param, grad, moment, group.lists); });
      });
    });
  }
}

template <class Executor>
void lamb_prepare(const Executor& executor, const LambCall& call) {
  LambPrepare prepare{{},          0,
                      call.constants.beta1, call.constants.beta2,
                      call.lr,     call.scales,
                      call.one_for_all, call.found_inf,
                      call.coefficients};
  for (int64_t first = 0; first < call.count; first += LambPrepare::kTensors) {
    const int64_t left = call.count - first, part = left < LambPrepare::kTensors ? left : LambPrepare::kTensors;
    for (int64_t i = 0; i < part; ++i) prepare.steps[i] = call.steps[first + i];
    prepare.first = int(first);
    executor.each(part, prepare);
  }
}

template <class Executor>
void lamb(const Executor& executor, const LambCall& call) {
  const LambRule rule(call.constants);
  const LambCoefficients* const c = call.coefficients;
  lamb_prepare(executor, call);
  lamb_groups(call.groups, [&](auto param, auto grad, auto moment, const Lists& lists) {
    using P = decltype(param);
    using G = decltype(grad);
    using M = decltype(moment);
    if (call.constants.averaging) {
      executor.visit(lists, LambMoments<P, G, M, true>{rule, c}, call.partials);
    } else {
      executor.visit(lists, LambMoments<P, G, M, false>{rule, c}, call.partials);
    }
  });
  if (call.constants.adapt) {
    executor.template reduce<2>(call.count, call.sizes, call.partials, call.sums);
    executor.each(call.count, LambTrust{call.lr, call.sums, call.coefficients});
  }
  lamb_groups(call.groups, [&](auto param, auto, auto moment, Lists lists) {
    lists.pointers[1] = lists.pointers[2];  // this pass knows no gradients
    lists.pointers[2] = lists.pointers[3];
    executor.visit(lists, LambWeights<decltype(param), decltype(moment)>{rule, c});
  });
}

}  // namespace vitrail
