// Mixtures of experts.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind.h"
#include "mixture.h"
#include "stream.h"

namespace headrace {
namespace {

// The weights of one layer's experts, which their owner keeps.
class Experts {
 public:
  Experts(const std::vector<const PackedMatrix*>& up, const std::vector<const PackedMatrix*>& down) {
    if (up.empty() || up.size() != down.size()) throw std::invalid_argument("a mixture has experts, each with up and down");
    std::vector<Expert> experts;
    for (size_t e = 0; e < up.size(); ++e) experts.push_back({up[e]->view(), down[e]->view()});
    experts_ = std::make_shared<const std::vector<Expert>>(std::move(experts));
  }
  const std::shared_ptr<const std::vector<Expert>>& list() const { return experts_; }

 private:
  std::shared_ptr<const std::vector<Expert>> experts_;
};

class NativeMixture {
 public:
  NativeMixture(const std::string& target, int64_t experts_per_token, bool is_renormalized, ActivationKind activation,
                bool is_batch_invariant)
      : target_(TargetFromName(target)) {
    call_.experts_per_token = experts_per_token;
    call_.is_renormalized = is_renormalized;
    call_.activation = activation;
    call_.is_batch_invariant = is_batch_invariant;
  }

  size_t WorkspaceBytes(const Experts& experts, DType dtype, int64_t num_tokens) const {
    return MixtureWorkspaceBytes(Call(experts, dtype, num_tokens));
  }

  void Run(Stream& stream, const Experts& experts, const ArmsByRows& up_arms, const ArmsByRows& down_arms, DType dtype,
           int64_t num_tokens, uintptr_t x, uintptr_t router_logits, uintptr_t out, uintptr_t workspace) const {
    MixtureCall call = Call(experts, dtype, num_tokens);
    call.up_arms = up_arms;
    call.down_arms = down_arms;
    call.x = Pointer<const void>(x);
    call.router_logits = Pointer<const void>(router_logits);
    call.out = Pointer<void>(out);
    call.workspace = Pointer<char>(workspace);
    stream.Run("experts", [target = target_, call] { Mixture(target, call); });
  }

 private:
  MixtureCall Call(const Experts& experts, DType dtype, int64_t num_tokens) const {
    MixtureCall call = call_;
    call.experts = experts.list();
    call.dtype = dtype;
    call.num_tokens = num_tokens;
    return call;
  }

  Target target_;
  MixtureCall call_ = {};
};

}  // namespace

void DefineMixture(nb::module_& m) {
  nb::class_<Experts>(m, "Experts")
      .def(nb::init<const std::vector<const PackedMatrix*>&, const std::vector<const PackedMatrix*>&>(), nb::arg("up"),
           nb::arg("down"));
  nb::class_<ArmsByRows>(m, "ArmsByRows")
      .def(
          "__init__",
          [](ArmsByRows* self, int64_t flat_gemm_from, int64_t gemm_from) {
            new (self) ArmsByRows{flat_gemm_from, gemm_from};
          },
          nb::arg("flat_gemm_from"), nb::arg("gemm_from"));
  nb::class_<NativeMixture>(m, "Mixture")
      .def(nb::init<const std::string&, int64_t, bool, ActivationKind, bool>(), nb::arg("target"),
           nb::arg("experts_per_token"), nb::arg("is_renormalized"), nb::arg("activation"), nb::arg("batch_invariant"))
      .def("workspace_bytes", &NativeMixture::WorkspaceBytes, nb::arg("experts"), nb::arg("dtype"),
           nb::arg("num_tokens"))
      .def("run", &NativeMixture::Run, nb::arg("stream"), nb::arg("experts"), nb::arg("up_arms"), nb::arg("down_arms"),
           nb::arg("dtype"), nb::arg("num_tokens"), nb::arg("x_ptr"), nb::arg("router_logits_ptr"), nb::arg("out_ptr"),
           nb::arg("workspace_ptr"), Unlocked());
}

}  // namespace headrace
