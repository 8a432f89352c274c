// Exponential moving average: teacher <- lerp(teacher, student, 1 - momentum), with a bf16 copy of it if wanted.
#pragma once

#include "lists.h"

namespace vitrail {

struct EmaCall {
  Groups groups;  // streams: teacher, student, then the copy if there is one
  bool shadow;
  Scalar momentum;
  const float* found_inf;
};

struct EmaCoefficients {
  float weight;
  bool skip;
};

template <class Student, class... Shadow>
struct Ema {
  using Streams = Types<float, Student, Shadow...>;
  using Coefficients = EmaCoefficients;
  static constexpr unsigned kReads = 0b011, kWrites = sizeof...(Shadow) ? 0b101 : 0b001;
  static constexpr int kSums = 0;

  Scalar momentum;
  const float* found_inf;

  VITRAIL_HD Coefficients coefficients(int) const { return {float(1.0 - momentum.read()), raised(found_inf)}; }

  VITRAIL_HD void operator()(float* x, const Coefficients& c, float*) const {
    x[0] = lerp(x[0], x[1], c.weight);
    if (sizeof...(Shadow)) x[2] = x[0];
  }
};

template <class Executor>
void ema(const Executor& executor, const EmaCall& call) {
  for (int64_t g = 0; g < call.groups.count; ++g) {
    const Group& group = call.groups.groups[g];
    with_type(group.bf16 >> 1 & 1, [&](auto student) {
      using Student = decltype(student);
      if (call.shadow) {
        executor.visit(group.lists, Ema<Student, bf16>{call.momentum, call.found_inf});
      } else {
        executor.visit(group.lists, Ema<Student>{call.momentum, call.found_inf});
      }
    });
  }
}

}  // namespace vitrail
