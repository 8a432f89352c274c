// LARS: SGD with momentum whose rate is scaled to the norm of each tensor's weights.
//
// Two passes: norms of the weights and of the update, then the update itself. The order of roundings is that of
// PyTorch's SGD, with one product more for the ratio.
#pragma once

#include "lists.h"

namespace vitrail {

struct LarsCoefficients {
  float decay;  // added to the gradient as decay * parameter
  float scale;  // of the gradient
  float ratio;  // of the update on its way into the momentum
  float step;   // of the momentum on its way into the weights
  bool skip;
};

struct LarsConstants {
  double momentum, weight_decay, trust, eps;
  bool adapt;           // multiply by a trust ratio
  bool lr_in_momentum;  // the rate multiplies the update, not the momentum
  bool parts;           // divide by |g| + decay |p| + eps, not by |g + decay p|
  bool clip;            // replace the ratio by min(ratio / rate, 1)
};

struct LarsCall {
  Groups groups;  // streams: parameter, gradient, momentum
  int64_t count;
  const int64_t* sizes;
  LarsConstants constants;
  Scalar lr;
  const float* scales;  // of the gradients: null, one for all, or one for each
  bool one_for_all;
  const float* found_inf;
  float* partials;  // two for each chunk, if there are ratios
  double* sums;     // two for each tensor
  LarsCoefficients* coefficients;
};

// What the norms need to know of a tensor, and its final coefficients once they are there.
struct LarsPrepare {
  LarsConstants constants;
  Scalar lr;
  const float* scales;
  bool one_for_all;
  const float* found_inf;
  const double* sums;
  LarsCoefficients* all;

  VITRAIL_HD explicit LarsPrepare(const LarsCall& call)
      : constants(call.constants),
        lr(call.lr),
        scales(call.scales),
        one_for_all(call.one_for_all),
        found_inf(call.found_inf),
        sums(call.sums),
        all(call.coefficients) {}

  VITRAIL_HD LarsCoefficients before(int tensor) const {
    LarsCoefficients c{};
    c.skip = raised(found_inf);
    c.decay = float(constants.weight_decay);
    c.scale = scales ? scales[one_for_all ? 0 : tensor] : 1.0f;
    return c;
  }

  VITRAIL_HD void operator()(int tensor) const {
    LarsCoefficients c = before(tensor);
    if (!c.skip) {
      const double rate = lr.read();
      double ratio = constants.adapt ? adapted(sqrt(sums[2 * tensor]), sqrt(sums[2 * tensor + 1]), rate, c) : 1.0;
      if (constants.lr_in_momentum) ratio *= rate;
      c.ratio = float(ratio);
      c.step = constants.lr_in_momentum ? -1.0f : float(-rate);
    }
    all[tensor] = c;
  }

  VITRAIL_HD double adapted(double weight, double update, double rate, LarsCoefficients& c) const {
    double ratio;
    if (constants.parts) {
      if (weight == 0.0 || update == 0.0) {  // `update` is the gradient here
        c.decay = 0.0f;
        return 1.0;
      }
      ratio = constants.trust * weight / (update + weight * constants.weight_decay + constants.eps);
    } else {
      if (!(weight > 0.0 && update > 0.0)) return 1.0;
      ratio = constants.trust * weight / update;
    }
    if (!constants.clip) return ratio;
    ratio /= rate;
    return ratio > 1.0 ? 1.0 : ratio;
  }
};

// Squares of the weights, and of the gradients or of what they make with the decay.
template <class Param, class Grad>
struct LarsNorms {
  using Streams = Types<Param, Grad>;
  using Coefficients = LarsCoefficients;
  static constexpr unsigned kReads = 0b11, kWrites = 0;
  static constexpr int kSums = 2;

  LarsPrepare prepare;

  VITRAIL_HD Coefficients coefficients(int tensor) const {
    Coefficients c = prepare.before(tensor);
    if (prepare.constants.parts) c.decay = 0.0f;
    return c;
  }

  VITRAIL_HD void operator()(float* x, const Coefficients& c, float* sums) const {
    const float update = fma(c.decay, x[0], x[1] * c.scale);
    sums[0] = fma(x[0], x[0], sums[0]);
    sums[1] = fma(update, update, sums[1]);
  }
};

template <class Param, class Grad>
struct Lars {
  using Streams = Types<Param, Grad, float>;
  using Coefficients = LarsCoefficients;
  static constexpr unsigned kReads = 0b111, kWrites = 0b101;
  static constexpr int kSums = 0;

  float momentum;
  const LarsCoefficients* all;

  VITRAIL_HD Coefficients coefficients(int tensor) const { return all[tensor]; }

  VITRAIL_HD void operator()(float* x, const Coefficients& c, float*) const {
    const float update = fma(c.decay, x[0], x[1] * c.scale) * c.ratio;
    x[2] = x[2] * momentum + update;
    x[0] = fma(c.step, x[2], x[0]);
  }
};

// Calls `function(parameter, gradient, lists)` for each group, with values of the streams' types.
template <class Function>
void lars_groups(const Groups& groups, const Function& function) {
  for (int64_t g = 0; g < groups.count; ++g) {
    const Group& group = groups.groups[g];
    with_type(group.bf16 & 1, [&](auto param) {
      with_type(group.bf16 >> 1 & 1, [&](auto grad) { function(param, grad, group.lists); });
    });
  }
}

template <class Executor>
void lars(const Executor& executor, const LarsCall& call) {
  const LarsPrepare prepare(call);
  if (call.constants.adapt) {
    lars_groups(call.groups, [&](auto param, auto grad, const Lists& lists) {
      executor.visit(lists, LarsNorms<decltype(param), decltype(grad)>{prepare}, call.partials);
    });
    executor.template reduce<2>(call.count, call.sizes, call.partials, call.sums);
  }
  executor.each(call.count, prepare);
  const float momentum = float(call.constants.momentum);
  lars_groups(call.groups, [&](auto param, auto grad, const Lists& lists) {
    executor.visit(lists, Lars<decltype(param), decltype(grad)>{momentum, call.coefficients});
  });
}

}  // namespace vitrail
