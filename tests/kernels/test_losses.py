"""The losses as modules: they hold what the functions need and add nothing."""

import copy

import pytest
import torch
from torch import nn

from vitrail import kernels
from vitrail.kernels import (
    clip_loss,
    cross_view_match,
    info_nce_loss,
    koleo_loss,
    losses,
    nt_xent_loss,
    prototype_cross_entropy,
    sinkhorn_center,
    update_center_,
)
from vitrail.kernels.losses import CLIPLoss, InfoNCELoss, KoLeoLoss, NTXentLoss, PrototypeCrossEntropy

MODULES = (CLIPLoss, InfoNCELoss, KoLeoLoss, NTXentLoss, PrototypeCrossEntropy)


def randn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def test_the_package_exports_every_loss():
    functions = clip_loss, info_nce_loss, koleo_loss, nt_xent_loss, prototype_cross_entropy
    helpers = cross_view_match, update_center_, sinkhorn_center, kernels.sinkhorn_knopp
    for thing in (*MODULES, *functions, *helpers):
        assert thing.__name__ in kernels.__all__
        assert getattr(kernels, thing.__name__) is thing
        assert thing.__doc__


@pytest.mark.parametrize("module", [losses.NTXentLoss, losses.InfoNCELoss])
def test_contrastive_modules_equal_their_functions(module):
    a, b = randn(6, 8), randn(6, 8, seed=1)
    function = nt_xent_loss if module is NTXentLoss else info_nce_loss
    loss = module(0.3, impl="reference")
    assert torch.equal(loss(a, b), function(a, b, 0.3))
    assert repr(loss) == f"{module.__name__}(temperature=0.3, gathers=False, impl='reference')"
    assert not loss.state_dict()
    assert torch.equal(module()(a, b), function(a, b, 0.1 if module is NTXentLoss else 0.2))


def test_info_nce_with_a_queue():
    q, k, queue = randn(4, 8), randn(4, 8, seed=1), nn.functional.normalize(randn(9, 8, seed=2))
    assert torch.equal(InfoNCELoss()(q, k, queue), info_nce_loss(q, k, 0.2, queue=queue))


def test_koleo():
    x = randn(7, 5)
    assert torch.equal(KoLeoLoss(1e-4)(x), koleo_loss(x, eps=1e-4))
    assert repr(KoLeoLoss()) == "KoLeoLoss(eps=1e-08, impl='auto')"


def test_clip_learns_its_scale():
    a, b = randn(6, 8), randn(6, 8, seed=1)
    loss = CLIPLoss()
    assert loss.log_scale.item() == pytest.approx(2.6592600)
    value = loss(a, b)
    assert torch.equal(value, clip_loss(a, b, loss.log_scale.exp().detach()))
    value.backward()

    logits = nn.functional.normalize(a).double() @ nn.functional.normalize(b).double().T
    exact = loss.log_scale.detach().double().requires_grad_()
    scaled = exact.exp() * logits
    target = torch.arange(6)
    (nn.functional.cross_entropy(scaled, target) / 2 + nn.functional.cross_entropy(scaled.T, target) / 2).backward()
    torch.testing.assert_close(loss.log_scale.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
    assert repr(loss) == "CLIPLoss(max_scale=100.0, gathers=False, impl='auto')"
    assert list(loss.state_dict()) == ["log_scale"]


def test_clips_scale_is_clamped():
    a, b = randn(6, 8), randn(6, 8, seed=1)
    loss = CLIPLoss(temperature=0.001, max_scale=50.0)
    value = loss(a, b)
    assert torch.equal(value, clip_loss(a, b, 50.0))
    value.backward()
    assert loss.log_scale.grad == 0
    fixed = CLIPLoss(learned=False)
    assert not fixed.log_scale.requires_grad
    assert not fixed(a, b).requires_grad


def test_clip_loads_a_saved_scale():
    loss = CLIPLoss(0.01)
    other = CLIPLoss()
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.log_scale, loss.log_scale)


@pytest.mark.parametrize("module", [NTXentLoss, InfoNCELoss, CLIPLoss])
def test_errors_of_the_contrastive_modules(module):
    for temperature in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="temperature must be a finite positive number"):
            module(temperature)
    with pytest.raises(TypeError, match=r"group must be a torch\.distributed process group"):
        module(group="world")


# --- PrototypeCrossEntropy -------------------------------------------------------------------------------------------

STUDENT, TEACHER = randn(8, 6), randn(4, 6, seed=1)
OURS, THEIRS = randn(17, 6, seed=2), randn(17, 6, seed=3)
ROWS = STUDENT, OURS, TEACHER, THEIRS
MATCH = cross_view_match(4, 2, 2)


@pytest.mark.parametrize("impl", ["auto", "chunked", "reference"])
def test_the_centre_of_a_step_is_that_of_the_steps_before(impl):
    loss = PrototypeCrossEntropy(17, student_temp=0.5, center_momentum=0.8, impl=impl)
    assert loss.center.dtype == torch.float32
    center = torch.zeros(17)
    for _ in range(3):
        options = {"student_temp": 0.5, "teacher_temp": 0.4, "center": center, "match": MATCH, "impl": impl}
        assert torch.equal(loss(*ROWS, 0.4, match=MATCH), prototype_cross_entropy(*ROWS, **options))
        assert torch.equal(loss.center, center)  # the loss itself leaves it
        loss.update_center(TEACHER, THEIRS)
        update_center_(center, TEACHER, THEIRS, 0.8)
        assert torch.equal(loss.center, center)
        assert center.any()


@pytest.mark.parametrize("impl", ["auto", "chunked", "reference"])
def test_sinkhorn_centring(impl):
    loss = PrototypeCrossEntropy(17, 0.5, "sinkhorn", iterations=2, impl=impl, normalized=True)
    center = sinkhorn_center(TEACHER, THEIRS, 0.4, 2)
    options = {"student_temp": 0.5, "teacher_temp": 0.4, "center": center, "match": MATCH, "impl": impl}
    assert torch.equal(loss(*ROWS, 0.4, match=MATCH), prototype_cross_entropy(*ROWS, **options))
    loss.update_center(TEACHER, THEIRS)
    assert not loss.center.any()


def test_no_centring_and_weights():
    loss = PrototypeCrossEntropy(17, 0.5, "none")
    weight = torch.rand(8)
    expected = prototype_cross_entropy(*ROWS, student_temp=0.5, teacher_temp=0.4, match=MATCH, weight=weight)
    assert torch.equal(loss(*ROWS, 0.4, match=MATCH, weight=weight), expected)
    loss.update_center(TEACHER, THEIRS)
    assert not loss.center.any()


def test_the_promise_of_unit_rows_is_passed_on():
    rows = [nn.functional.normalize(matrix) for matrix in ROWS]
    plain, promised = (PrototypeCrossEntropy(17, normalized=normalized) for normalized in (False, True))
    torch.testing.assert_close(promised(*rows, 0.04, match=MATCH), plain(*rows, 0.04, match=MATCH))


def test_the_centre_is_saved_and_follows_the_module():
    loss = PrototypeCrossEntropy(17)
    loss.update_center(TEACHER, THEIRS)
    state = copy.deepcopy(loss.state_dict())
    assert list(state) == ["center"]
    other = PrototypeCrossEntropy(17)
    other.load_state_dict(state)
    assert torch.equal(other.center, loss.center)
    assert not list(loss.parameters())
    assert loss.to("meta").center.device.type == "meta"


def test_layers_get_their_gradients():
    loss = PrototypeCrossEntropy(17, normalized=False)
    ours, theirs = nn.Linear(6, 17, bias=False), nn.Linear(6, 17, bias=False)
    loss(STUDENT, ours, TEACHER, theirs, 0.04, match=MATCH).backward()
    assert ours.weight.grad.any()
    assert theirs.weight.grad is None


def test_the_repr_and_the_errors():
    assert repr(PrototypeCrossEntropy(17)) == (
        "PrototypeCrossEntropy(num_prototypes=17, student_temp=0.1, centering='mean', normalized=False, impl='auto')"
    )
    with pytest.raises(ValueError, match="centering must be one of 'mean', 'sinkhorn', 'none', got 'sk'"):
        PrototypeCrossEntropy(17, centering="sk")
    with pytest.raises(ValueError, match=r"center_momentum must lie between 0 and 1, got -0\.1"):
        PrototypeCrossEntropy(17, center_momentum=-0.1)
    with pytest.raises(ValueError, match="student_temp must be a finite positive number"):
        PrototypeCrossEntropy(17, student_temp=0)
    with pytest.raises(TypeError, match=r"group must be a torch\.distributed process group"):
        PrototypeCrossEntropy(17, group="world")
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        PrototypeCrossEntropy(17, centering="sinkhorn", iterations=0)
    with pytest.raises(ValueError, match=r"center must have shape \[17\], got \[16\]"):
        PrototypeCrossEntropy(16)(*ROWS, 0.04, match=MATCH)
