// AdamW, the moving average of its weights and bf16 copies of both, in one pass.
//
// The order of roundings is that of PyTorch's fused AdamW followed by torch.lerp.
#pragma once

#include "lists.h"

namespace vitrail {

struct AdamWCoefficients {
  float decay;       // 1 - lr * weight_decay
  float step_size;   // -lr / (1 - beta1^step)
  float correction;  // sqrt(1 - beta2^step)
  float scale;       // of the gradient
  float ema_weight;  // 1 - momentum of the moving average
  bool skip;
};

struct AdamWConstants {
  double beta1, beta2, weight_decay;
  float eps;
};

struct AdamWCall {
  Groups groups;  // streams: parameter, gradient, both moments, then the optional ones
  bool teacher, param_copy, teacher_copy;
  int64_t count;
  float* const* steps;  // one for each tensor
  AdamWConstants constants;
  Scalar lr, ema_momentum;
  const float* scales;  // of the gradients: null, one for all, or one for each
  bool one_for_all;
  const float* found_inf;
  AdamWCoefficients* coefficients;  // room for one a tensor
};

// Counts the step of one tensor and works out what its elements need.
struct AdamWPrepare {
  static constexpr int kTensors = 1024;  // whose step counters one launch carries
  float* steps[kTensors];
  int first;
  AdamWConstants constants;
  Scalar lr, ema_momentum;
  const float* scales;
  bool one_for_all;
  const float* found_inf;
  AdamWCoefficients* coefficients;

  VITRAIL_HD void operator()(int i) const {
    const int tensor = first + i;
    AdamWCoefficients c{};
    c.skip = raised(found_inf);
    if (!c.skip) {
      const double step = *steps[i] + 1.0, rate = lr.read();
      *steps[i] = float(step);
      c.decay = float(1.0 - rate * constants.weight_decay);
      c.step_size = float(-(rate / (1.0 - pow(constants.beta1, step))));
      c.correction = float(sqrt(1.0 - pow(constants.beta2, step)));
      c.scale = scales ? scales[one_for_all ? 0 : tensor] : 1.0f;
      c.ema_weight = float(1.0 - ema_momentum.read());
    }
    coefficients[tensor] = c;
  }
};

// The update of one element; `c` as above.
struct AdamWRule {
  float gain1, beta2, gain2, eps;  // gain: 1 - beta

  VITRAIL_HD explicit AdamWRule(const AdamWConstants& constants)
      : gain1(float(1.0 - constants.beta1)),
        beta2(float(constants.beta2)),
        gain2(float(1.0 - constants.beta2)),
        eps(constants.eps) {}

  VITRAIL_HD void operator()(float& param, float grad, float& mean, float& square, const AdamWCoefficients& c) const {
    grad *= c.scale;
    mean = lerp(mean, grad, gain1);
    square = fma(gain2 * grad, grad, square * beta2);
    const float denominator = square_root(square) / c.correction + eps;
    param = param * c.decay + c.step_size * mean / denominator;
  }
};

// Streams: parameter, gradient, moments; teacher if kTeacher; copies of the parameter and of the teacher if wanted.
template <class Param, class Grad, bool kTeacher, bool kParamCopy, bool kTeacherCopy, class... Optional>
struct AdamWEma {
  using Streams = Types<Param, Grad, float, float, Optional...>;
  using Coefficients = AdamWCoefficients;
  static constexpr int kParamCopyStream = 4 + kTeacher, kTeacherCopyStream = kParamCopyStream + kParamCopy;
  static constexpr unsigned kReads = kTeacher ? 0b11111 : 0b01111;
  static constexpr unsigned kWrites = ((1u << Streams::kCount) - 1) & ~0b10u;  // all but the gradient
  static constexpr int kSums = 0;

  AdamWRule rule;
  const AdamWCoefficients* all;

  VITRAIL_HD Coefficients coefficients(int tensor) const { return all[tensor]; }

  VITRAIL_HD void operator()(float* x, const Coefficients& c, float*) const {
    rule(x[0], x[1], x[2], x[3], c);
    x[0] = to_float(from_float<Param>(x[0]));  // the average is of the weights as they are stored
    if (kTeacher) x[4] = lerp(x[4], x[0], c.ema_weight);
    if (kParamCopy) x[kParamCopyStream] = x[0];
    if (kTeacherCopy) x[kTeacherCopyStream] = x[4];
  }
};

template <class Param, class Grad, class Executor>
void adamw_visit(const Executor& executor, const AdamWCall& call, const Lists& lists) {
  const AdamWRule rule(call.constants);
  const AdamWCoefficients* c = call.coefficients;
  if (!call.teacher) {
    if (call.param_copy) return executor.visit(lists, AdamWEma<Param, Grad, false, true, false, bf16>{rule, c});
    return executor.visit(lists, AdamWEma<Param, Grad, false, false, false>{rule, c});
  }
  if (call.param_copy && call.teacher_copy)
    return executor.visit(lists, AdamWEma<Param, Grad, true, true, true, float, bf16, bf16>{rule, c});
  if (call.param_copy) return executor.visit(lists, AdamWEma<Param, Grad, true, true, false, float, bf16>{rule, c});
  if (call.teacher_copy) return executor.visit(lists, AdamWEma<Param, Grad, true, false, true, float, bf16>{rule, c});
  executor.visit(lists, AdamWEma<Param, Grad, true, false, false, float>{rule, c});
}

template <class Executor>
void adamw(const Executor& executor, const AdamWCall& call) {
  AdamWPrepare prepare{{},          0,           call.constants, call.lr, call.ema_momentum, call.scales, call.one_for_all,
                       call.found_inf, call.coefficients};
  for (int64_t first = 0; first < call.count; first += AdamWPrepare::kTensors) {
    const int64_t left = call.count - first, part = left < AdamWPrepare::kTensors ? left : AdamWPrepare::kTensors;
    for (int64_t i = 0; i < part; ++i) prepare.steps[i] = call.steps[first + i];
    prepare.first = int(first);
    executor.each(part, prepare);
  }
  for (int64_t g = 0; g < call.groups.count; ++g) {
    const Group& group = call.groups.groups[g];
    with_type(group.bf16 & 1, [&](auto param) {
      with_type(group.bf16 >> 1 & 1, [&](auto grad) {
        adamw_visit<decltype(param), decltype(grad)>(executor, call, group.lists);
      });
    });
  }
}

}  // namespace vitrail
