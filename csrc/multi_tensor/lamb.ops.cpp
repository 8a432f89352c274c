// LAMB as an op of PyTorch: one function for CPU and CUDA. With `dry` it only checks.
#include "host_lists.h"
#include "lamb.h"

namespace vitrail {
namespace {

// By reference: copying a list would copy a shared pointer for every tensor.
using List = const std::vector<Tensor>&;
using Maybe = const std::optional<Tensor>&;

void check_moments(List exp_avgs, List exp_avg_sqs) {
  for (size_t t = 0; t < exp_avgs.size(); ++t) {
    const auto first = exp_avgs[t].scalar_type(), second = exp_avg_sqs[t].scalar_type();
    require(first == second, "exp_avgs[", t, "] is ", name_of(first), ", exp_avg_sqs[", t, "] is ", name_of(second),
            "; give both the same dtype, or use the reference");
  }
}

void lamb_op(List params, List grads, List exp_avgs, List exp_avg_sqs, List steps, const Tensor& lr, double beta1,
             double beta2, double eps, double weight_decay, bool grad_averaging, bool adapt, Maybe scales,
             Maybe found_inf, bool dry) {
  const HostLists lists({{"params", params, true},
                         {"grads", grads, true},
                         {"exp_avgs", exp_avgs, true},
                         {"exp_avg_sqs", exp_avg_sqs, true}});
  check_moments(exp_avgs, exp_avg_sqs);
  const auto device = lists.device();
  const Scales factors(scales, lists.count(), device);
  const auto counters = step_pointers(steps, lists.count(), device);
  std::vector<Tensor> kept;
  const LambCall call{lists.groups(),
                      lists.count(),
                      lists.sizes(),
                      counters.data(),
                      {beta1, beta2, weight_decay, float(eps), grad_averaging, adapt},
                      scalar("lr", lr, device),
                      factors.values,
                      factors.one_for_all,
                      flag("found_inf", found_inf, device),
                      workspace<float>(kept, params.front(), 2 * lists.chunks()),
                      workspace<double>(kept, params.front(), 2 * lists.count()),
                      workspace<LambCoefficients>(kept, params.front(), lists.count())};
  if (!dry) VITRAIL_RUN(lamb, call, lists);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vitrail_C, m) {
  m.def(
      "lamb_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] steps, Tensor lr, float beta1, float beta2, float eps, float weight_decay, bool grad_averaging, "
      "bool adapt, Tensor? scales, Tensor? found_inf, bool dry) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vitrail_C, CPU, m) { m.impl("lamb_", TORCH_BOX(&lamb_op)); }
STABLE_TORCH_LIBRARY_IMPL(vitrail_C, CUDA, m) { m.impl("lamb_", TORCH_BOX(&lamb_op)); }

}  // namespace vitrail
