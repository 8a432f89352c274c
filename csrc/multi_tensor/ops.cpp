// The operations over lists as ops of PyTorch: one function each for CPU and CUDA. With `dry` they only check.
#include <tuple>

#include "backends.h"
#include "host_lists.h"

namespace vitrail {
namespace {

// By reference: copying a list would copy a shared pointer for every tensor.
using List = const std::vector<Tensor>&;
using Maybe = const std::optional<Tensor>&;

void ema_op(List teachers, List students, List shadows, const Tensor& momentum, Maybe found_inf, bool dry) {
  std::vector<Stream> streams{{"teacher", teachers, false}, {"student", students, true}};
  if (!shadows.empty()) streams.push_back({"shadow", shadows, true, true});
  const HostLists lists(streams);
  const auto device = lists.device();
  const EmaCall call{lists.groups(), !shadows.empty(), scalar("momentum", momentum, device),
                     flag("found_inf", found_inf, device)};
  if (!dry) VITRAIL_RUN(ema, call, lists);
}

std::tuple<Tensor, Tensor, Tensor> norm_op(List tensors, bool dry) {
  const HostLists lists({{"tensors", tensors, true}});
  const auto result = [&](torch::headeronly::IntHeaderOnlyArrayRef sizes) {
    return torch::stable::new_empty(tensors.front(), sizes, ScalarType::Float);
  };
  const Tensor total = result({}), norms = result({lists.count()}), found_inf = result({});
  std::vector<Tensor> kept;
  const NormCall call{lists.groups(),
                      lists.count(),
                      lists.sizes(),
                      workspace<float>(kept, total, lists.chunks()),
                      workspace<double>(kept, total, lists.count() + 1),
                      static_cast<float*>(norms.data_ptr()),
                      static_cast<float*>(total.data_ptr()),
                      static_cast<float*>(found_inf.data_ptr())};
  if (!dry) VITRAIL_RUN(norm, call, lists);
  return {total, norms, found_inf};
}

void scale_op(List tensors, const Tensor& scales, bool dry) {
  const HostLists lists({{"tensors", tensors, true}});
  const Scales factors(scales, lists.count(), lists.device());
  const ScaleCall call{lists.groups(), factors.values, factors.one_for_all};
  if (!dry) VITRAIL_RUN(scale, call, lists);
}

void adamw_op(List params, List grads, List exp_avgs, List exp_avg_sqs, List teachers, List param_copies,
              List teacher_copies, List steps, const Tensor& lr, const Tensor& ema_momentum, double beta1, double beta2, double eps,
              double weight_decay, Maybe scales, Maybe found_inf, bool dry) {
  std::vector<Stream> streams{{"params", params, true},
                              {"grads", grads, true},
                              {"exp_avgs", exp_avgs, false},
                              {"exp_avg_sqs", exp_avg_sqs, false}};
  if (!teachers.empty()) streams.push_back({"teachers", teachers, false});
  if (!param_copies.empty()) streams.push_back({"param_copies", param_copies, true, true});
  if (!teacher_copies.empty()) streams.push_back({"teacher_copies", teacher_copies, true, true});
  require(!teachers.empty() || teacher_copies.empty(), "teacher_copies are given without teachers; pass both");
  const HostLists lists(streams);
  const auto device = lists.device();
  const Scales factors(scales, lists.count(), device);
  const auto counters = step_pointers(steps, lists.count(), device);
  std::vector<Tensor> kept;
  const AdamWCall call{lists.groups(),
                       !teachers.empty(),
                       !param_copies.empty(),
                       !teacher_copies.empty(),
                       lists.count(),
                       counters.data(),
                       {beta1, beta2, weight_decay, float(eps)},
                       scalar("lr", lr, device),
                       scalar("ema_momentum", ema_momentum, device),
                       factors.values,
                       factors.one_for_all,
                       flag("found_inf", found_inf, device),
                       workspace<AdamWCoefficients>(kept, params.front(), lists.count())};
  if (!dry) VITRAIL_RUN(adamw, call, lists);
}

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
      "multi_tensor_ema_(Tensor(a!)[] teachers, Tensor[] students, Tensor(b!)[] shadows, Tensor momentum, "
      "Tensor? found_inf, bool dry) -> ()");
  m.def("multi_tensor_norm(Tensor[] tensors, bool dry) -> (Tensor, Tensor, Tensor)");
  m.def("multi_tensor_scale_(Tensor(a!)[] tensors, Tensor scales, bool dry) -> ()");
  m.def(
      "adamw_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] teachers, Tensor(e!)[] param_copies, Tensor(f!)[] teacher_copies, Tensor(g!)[] steps, Tensor lr, "
      "Tensor ema_momentum, float beta1, float beta2, float eps, float weight_decay, Tensor? scales, "
      "Tensor? found_inf, bool dry) -> ()");
  m.def(
      "lars_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor lr, float momentum, "
      "float weight_decay, float trust_coefficient, float eps, bool adapt, bool lr_in_momentum, bool parts, "
      "bool clip_ratio, Tensor? scales, Tensor? found_inf, bool dry) -> ()");
  m.def(
      "lamb_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] steps, Tensor lr, float beta1, float beta2, float eps, float weight_decay, bool grad_averaging, "
      "bool adapt, Tensor? scales, Tensor? found_inf, bool dry) -> ()");
}

#define VITRAIL_REGISTER(m)                            \
  m.impl("multi_tensor_ema_", TORCH_BOX(&ema_op));     \
  m.impl("multi_tensor_norm", TORCH_BOX(&norm_op));    \
  m.impl("multi_tensor_scale_", TORCH_BOX(&scale_op)); \
  m.impl("adamw_ema_", TORCH_BOX(&adamw_op));          \
  m.impl("lars_", TORCH_BOX(&lars_op));                \
  m.impl("lamb_", TORCH_BOX(&lamb_op));

STABLE_TORCH_LIBRARY_IMPL(vitrail_C, CPU, m) { VITRAIL_REGISTER(m) }
STABLE_TORCH_LIBRARY_IMPL(vitrail_C, CUDA, m) { VITRAIL_REGISTER(m) }

}  // namespace vitrail
