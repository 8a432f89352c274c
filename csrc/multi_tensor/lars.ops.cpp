// LARS as an op of PyTorch: one function for CPU and CUDA. With `dry` it only checks.
#include "host_lists.h"
#include "lars.h"

namespace vitrail {
namespace {

// By reference: copying a list would copy a shared pointer for every tensor.
using List = const std::vector<Tensor>&;
using Maybe = const std::optional<Tensor>&;

void lars_op(List params, List grads, List momentum_buffers, const Tensor& lr, double momentum, double weight_decay,
             double trust_coefficient, double eps, bool adapt, bool lr_in_momentum, bool parts, bool clip_ratio,
             Maybe scales, Maybe found_inf, bool dry) {
  const HostLists lists(
      {{"params", params, true}, {"grads", grads, true}, {"momentum_buffers", momentum_buffers, false}});
  const auto device = lists.device();
  const Scales factors(scales, lists.count(), device);
  std::vector<Tensor> kept;
  const LarsCall call{
      lists.groups(),
      lists.count(),
      lists.sizes(),
      {momentum, weight_decay, trust_coefficient, eps, adapt, lr_in_momentum, parts, clip_ratio},
      scalar("lr", lr, device),
      factors.values,
      factors.one_for_all,
      flag("found_inf", found_inf, device),
      workspace<float>(kept, params.front(), adapt ? 2 * lists.chunks() : 0),
      workspace<double>(kept, params.front(), adapt ? 2 * lists.count() : 0),
      workspace<LarsCoefficients>(kept, params.front(), lists.count())};
  if (!dry) VITRAIL_RUN(lars, call, lists);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vitrail_C, m) {
  m.def(
      "lars_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor lr, float momentum, "
      "float weight_decay, float trust_coefficient, float eps, bool adapt, bool lr_in_momentum, bool parts, "
      "bool clip_ratio, Tensor? scales, Tensor? found_inf, bool dry) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vitrail_C, CPU, m) { m.impl("lars_", TORCH_BOX(&lars_op)); }
STABLE_TORCH_LIBRARY_IMPL(vitrail_C, CUDA, m) { m.impl("lars_", TORCH_BOX(&lars_op)); }

}  // namespace vitrail
