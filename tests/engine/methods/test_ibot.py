"""iBOT against golden values of the released code and against its dense form."""

import copy
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import dense_losses
import pytest
import torch
import torch.nn.functional as F

from vitrail.engine.methods.base import Schedule
from vitrail.engine.methods.centers import Distilled
from vitrail.engine.methods.ibot import IBOTConfig
from vitrail.engine.methods.masks import masked_rows
from vitrail.engine.methods.schedules import warmed_temperature
from vitrail.engine.models.heads import DINOHead
from vitrail.engine.models.resnet import ResNetConfig
from vitrail.engine.models.swin import SwinConfig
from vitrail.engine.models.vit import ViTConfig, dino_vit
from vitrail.engine.train.param_groups import releases

STEPS, IMAGES = 4, 4
VIT = replace(dino_vit(ViTConfig(image_size=16, patch_size=4, width=32, depth=2, heads=4)), mask_token=True)
SWIN = SwinConfig(image_size=32, width=16, depths=(2, 2), heads=(2, 2), window=3, mask_token=True)
SMALL = {"prototypes": 24, "hidden": 20, "bottleneck": 12, "local_crops": 3}
CONFIGS = {
    "shared": IBOTConfig(encoder=VIT, local_size=8, patch_teacher_temp=0.05, **SMALL),
    "own prototypes": IBOTConfig(encoder=VIT, local_size=8, patch_prototypes=17, **SMALL),
    "unit prototypes": IBOTConfig(encoder=VIT, local_size=8, norm_last_layer=True, mean_over_masked=True, **SMALL),
    "swin": IBOTConfig(encoder=SWIN, local_size=16, **SMALL),
    "packed": IBOTConfig(encoder=VIT, local_size=8, pack_crops=True, mask_shape="random", **SMALL),
    "sinkhorn": IBOTConfig(encoder=VIT, local_size=8, patch_prototypes=17, centering="sinkhorn", **SMALL),
    "no local crops": IBOTConfig(encoder=VIT, patch_prototypes=17, **{**SMALL, "local_crops": 0}),
}


def g(shape, a, b=0.0):
    """sin(a i + b) of the flat index i."""
    return torch.sin(a * torch.arange(math.prod(shape), dtype=torch.float64) + b).float().view(shape)


def schedule(step: int = 0, **changes) -> Schedule:
    given = Schedule(step=step, total_steps=STEPS, epoch=step / 2, seed=0, first_row=0, global_rows=IMAGES)
    return replace(given, **changes)


def batch(config, seed: int, images: int = IMAGES):
    generator = torch.Generator().manual_seed(seed)
    sizes = [config.encoder.size] * 2 + [(config.local_size,) * 2] * config.local_crops
    shapes = [(images, *size, 3) for size in sizes]
    return SimpleNamespace(views=[torch.randint(0, 256, s, dtype=torch.uint8, generator=generator) for s in shapes])


def built(name: str, **changes):
    torch.manual_seed(1)
    method = replace(CONFIGS[name], **changes).build().double().train()
    with torch.no_grad():
        method.student.mask_token.normal_()
        if not method.config.norm_last_layer:
            for head in method.student_heads.values():
                head.last_layer.weight_g.uniform_(0.5, 1.5)
    return method


def rows(values: torch.Tensor) -> Distilled:
    """Logits as features, whose prototypes are then the axes."""
    return Distilled(values, torch.eye(values.shape[-1]))


def test_golden():
    method = IBOTConfig(prototypes=32, encoder=VIT, hidden=8).build()
    student = rows(torch.cat([g((4, 32), 0.31), g((4, 32), 0.23, 0.9)]))
    teacher = rows(g((4, 32), 0.47, 0.5))
    ours, theirs = g((16, 32), 0.29, 0.2), g((16, 32), 0.43, 0.3)
    masks = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 1], [0, 1, 0, 0]]).bool()
    found = []
    for _ in range(2):
        index, weight = masked_rows(masks, 8)  # six are masked, two are padding
        view = method.view_loss(student, teacher, crops=4, epoch=0)
        patch = method.patch_loss(rows(ours[index]), rows(theirs[index]), weight / len(masks), epoch=0)
        found += [view.item(), patch.item()]
        method.centers.observe(teacher)
        method.patch_centers.observe(rows(theirs))
        method.after_step(True)
    assert found == pytest.approx([10.8235674, 9.3024931, 10.8256044, 9.3033009], abs=3e-6)
    assert method.patch_centers.value[0, :4].tolist() == pytest.approx(
        [-0.00044964, 0.00066675, 0.00166176, 0.00235420], abs=1e-8
    )


class Dense:
    """The loss as the released code computes it: all logits of all patches, one crop at a time, times the mask."""

    def __init__(self, method) -> None:
        self.method = copy.deepcopy(method)
        config = method.config
        self.centers = torch.zeros(config.prototypes, dtype=torch.float64)
        self.patch_centers = torch.zeros(config.patch_prototypes or config.prototypes, dtype=torch.float64)

    def logits(self, side: str, x: torch.Tensor, patches: bool) -> torch.Tensor:
        head = getattr(self.method, f"{side}_heads")["head"]
        layer = head.last_layer2 if patches and self.method.config.patch_prototypes else head.last_layer
        weight = layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True) * layer.weight_g
        return F.normalize(head.mlp(x), dim=-1) @ weight.T

    def targets(self, raw, raw_patches, masks, temperature: float, patch_temperature: float):
        """Of each large crop and its patches; Sinkhorn-Knopp balances those of both that are hidden together."""
        if self.method.config.centering == "centering":
            return (
                [F.softmax((logits - self.centers) / temperature, dim=-1) for logits in raw],
                [F.softmax((logits - self.patch_centers) / patch_temperature, dim=-1) for logits in raw_patches],
            )
        both = torch.stack(raw_patches)
        targets = torch.zeros_like(both)
        targets[masks] = dense_losses.sinkhorn(both[masks], patch_temperature)
        return dense_losses.sinkhorn(torch.cat(raw), temperature).chunk(2), targets

    def losses(self, crops, masks, epoch: float):
        """The loss of views and that of patches, the latter with weights in float32 as the method has them."""
        m, config = self.method, self.method.config
        warmup = config.warmup_teacher_temp_epochs
        temperature = warmed_temperature(epoch, config.warmup_teacher_temp, config.teacher_temp, warmup)
        patch_temperature = warmed_temperature(
            epoch, config.warmup_patch_teacher_temp, config.patch_teacher_temp, warmup
        )
        student = [m.student.forward_regions(crop, masks[v] if v < 2 else None) for v, crop in enumerate(crops)]
        with torch.no_grad():
            teacher = [m.teacher.forward_regions(crop) for crop in crops[:2]]
            raw = [self.logits("teacher", view, False) for view, _ in teacher]
            raw_patches = [self.logits("teacher", patches, True) for _, patches in teacher]
            targets, patch_targets = self.targets(raw, raw_patches, masks, temperature, patch_temperature)
        views, patches = [], []
        for i in range(2):
            for v, (ours, _) in enumerate(student):
                if v != i:
                    log = F.log_softmax(self.logits("student", ours, False) / config.student_temp, dim=-1)
                    views.append(-(targets[i] * log).sum(-1).mean())
            log = F.log_softmax(self.logits("student", student[i][1], True) / config.student_temp, dim=-1)
            each = -(patch_targets[i] * log).sum(-1) * masks[i]
            crops_that_count = (masks.sum(-1) > 0).sum() if config.mean_over_masked else masks[..., 0].numel()
            patches.append((each.sum(-1) * (1 / masks[i].sum(-1).clamp(min=1) / crops_that_count)).sum())
        self.centers = 0.9 * self.centers + 0.1 * torch.cat(raw).mean(0)
        self.patch_centers = 0.9 * self.patch_centers + 0.1 * torch.cat(raw_patches).mean((0, 1))
        return sum(views) / len(views), sum(patches)


def descend(parameters, lr: float = 0.1) -> None:
    with torch.no_grad():
        for p in parameters:
            if p.grad is not None:
                p -= lr * p.grad
                p.grad = None


def follow(method, momentum: float) -> None:
    with torch.no_grad():
        for pair in method.momentum_pairs():
            for p, q in zip(pair.teacher.parameters(), pair.student.parameters(), strict=True):
                p.lerp_(q, 1 - momentum)


def fewer(place, *args):
    """Masks with one patch less than wanted in crops that hide several, as where no rectangle fits any more."""
    masks = place(*args)
    first = masks & (masks.cumsum(1) == 1)
    return masks ^ (first & (masks.sum(1, keepdim=True) > 1))


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_are_those_of_the_dense_form(name):
    """Losses, all gradients and both centres over three steps in which student and teacher part."""
    method = built(name)
    dense = Dense(method)
    method.place = partial(fewer, method.place)
    whole, padded = 0, 0
    for step in range(STEPS - 1):
        views = batch(method.config, step).views
        hidden = method.hide(IMAGES, schedule(step), torch.device("cpu"))
        masks = hidden.masks.view(2, IMAGES, -1)
        masked = (masks.sum(-1) > 0).sum().item()
        whole, padded = whole + 2 * IMAGES - masked, padded + (hidden.weight == 0).sum().item()
        assert masked
        ours, metrics = method(SimpleNamespace(views=views), schedule(step))
        view, patch = dense.losses(views, masks, step / 2)
        torch.testing.assert_close(metrics["view_loss"], view, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(metrics["patch_loss"], patch, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours, metrics["view_loss"] + metrics["patch_loss"])
        assert metrics["masked"] == masks.float().mean()
        assert metrics["feature_std"] > 0
        ours.backward()
        (view + patch).backward()
        for key, p in method.named_parameters():
            other = dense.method.get_parameter(key)
            assert (p.grad is None) == (other.grad is None), key
            if p.grad is not None:
                torch.testing.assert_close(p.grad, other.grad, rtol=1e-7, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")
        for one in (method, dense.method):
            descend(one.parameters())
            follow(one, 0.6)
        method.after_step(True)
        for centers, expected in ((method.centers, dense.centers), (method.patch_centers, dense.patch_centers)):
            if method.config.centering == "centering":
                torch.testing.assert_close(centers.value[0], expected, rtol=1e-9, atol=1e-12)
                assert centers.value.abs().max() > 0
            else:
                assert not len(centers.value)
    assert whole
    assert padded


@pytest.mark.parametrize("shape", ["blocks", "random"])
def test_half_of_the_crops_hide_a_tenth_to_a_half(shape):
    """On the 14 x 14 patches of ViT-S/16."""
    config = replace(CONFIGS["shared"], encoder=replace(VIT, image_size=56), mask_shape=shape)
    method = config.build()
    hidden = method.hide(500, schedule(global_rows=500), torch.device("cpu"))
    shares = hidden.masks.double().mean(1)
    assert hidden.masks.shape == (1000, 196)
    hiding = shares > 0
    assert hiding.double().mean().item() == pytest.approx(0.5, abs=0.06)
    assert 0.04 < shares[hiding].min() < 0.12  # what is left over may be too small for a rectangle
    assert 0.47 < shares[hiding].max() <= 0.5
    assert shares[hiding].mean().item() == pytest.approx(0.3, abs=0.02)
    first, second = shares.view(2, 500)
    assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 0.2  # crops of an image draw for themselves
    same = (hidden.masks[:, 1:] == hidden.masks[:, :-1])[hiding].double().mean()
    assert (same > 0.85) == (shape == "blocks")
    assert (hidden.weight == 0).any() == (shape == "blocks")  # padding
    totals = torch.zeros(1000).index_add_(0, hidden.rows // 196, hidden.weight * 1000)
    torch.testing.assert_close(totals, hiding.float())


@pytest.mark.parametrize("shape", ["blocks", "random"])
def test_counts_and_places_are_drawn_apart(monkeypatch, shape):
    streams, draw = [], Schedule.uniform_everywhere

    def watched(self, columns, device, *, stream=0):
        streams.append(stream)
        return draw(self, columns, device, stream=stream)

    monkeypatch.setattr(Schedule, "uniform_everywhere", watched)
    built("shared", mask_shape=shape).hide(IMAGES, schedule(), torch.device("cpu"))
    assert len(streams) == len(set(streams)) == 2


@pytest.mark.parametrize("name", ["shared", "unit prototypes"])
def test_micro_batches_hide_what_the_whole_batch_does(name):
    method = built(name)
    whole = method.hide(IMAGES, schedule(), torch.device("cpu"))
    parts = [method.hide(IMAGES // 2, schedule(first_row=row), torch.device("cpu")) for row in (0, IMAGES // 2)]
    masks = torch.cat([part.masks.view(2, IMAGES // 2, -1) for part in parts], dim=1)
    assert torch.equal(masks, whole.masks.view(2, IMAGES, -1))
    found = sum(part.weight.sum() for part in parts) / 2
    torch.testing.assert_close(found, whole.weight.sum())
    hiding = whole.masks.any(1).float().mean().item()
    assert 0 < hiding < 1
    assert whole.weight.sum().item() == pytest.approx(1.0 if name == "unit prototypes" else hiding)
    assert not torch.equal(method.hide(IMAGES, schedule(1), torch.device("cpu")).masks, whole.masks)


@pytest.mark.parametrize(
    ("name", "batch_norm"), [("own prototypes", False), ("own prototypes", True), ("sinkhorn", False)]
)
def test_nothing_is_hidden_before_an_epoch(name, batch_norm):
    """Every parameter still gets a gradient, as on a rank whose crops all stay whole."""
    method = built(name, mask_epoch=2, head_batch_norm=batch_norm)
    loss, metrics = method(batch(method.config, 0), schedule(epoch=1.9))
    assert metrics["masked"] == metrics["patch_loss"] == 0
    loss.backward()
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    assert not method.student.mask_token.grad.any()
    assert not method.student_heads["head"].last_layer2.weight_v.grad.any()
    method.after_step(True)
    assert method.patch_centers.value.any() == (method.config.centering == "centering")
    _, metrics = method(batch(method.config, 0), schedule(epoch=2.0))
    assert metrics["masked"] > 0


def test_both_centres_move_once_and_only_with_the_step():
    whole, parts = built("own prototypes"), built("own prototypes")
    views = batch(whole.config, 0).views
    whole(SimpleNamespace(views=views), schedule())
    whole.after_step(True)
    for half in (slice(0, 2), slice(2, 4)):
        parts(SimpleNamespace(views=[v[half] for v in views]), schedule(first_row=half.start))
        assert not parts.patch_centers.value.any()
    parts.after_step(True)
    for name in ("centers", "patch_centers"):
        before = getattr(whole, name).value.clone()
        torch.testing.assert_close(getattr(parts, name).value, before)
        whole(SimpleNamespace(views=views), schedule(1))
        whole.after_step(False)
        whole.after_step(True)
        assert torch.equal(getattr(whole, name).value, before)


def test_published_heads():
    with torch.device("meta"):
        for width, count in ((384, 7_614_720), (768, 8_401_152)):
            assert sum(p.numel() for p in DINOHead(width, 8192).parameters()) == count
        head = DINOHead(384, 8192, patch_prototypes=4096)
    assert list(head.state_dict())[-4:] == [
        f"{layer}.{name}" for layer in ("last_layer", "last_layer2") for name in ("weight_g", "weight_v")
    ]
    x = torch.randn(3, 12)
    head = DINOHead(12, 8, patch_prototypes=5, hidden=6, bottleneck=4)
    assert [head(x)[1].shape, head(x, True)[1].shape] == [(8, 4), (5, 4)]
    shared = DINOHead(12, 8, hidden=6, bottleneck=4)
    assert torch.equal(shared(x, True)[1], shared(x)[1])


def test_prototypes_are_held_in_the_first_epochs():
    method = built("own prototypes")
    head = method.student_heads["head"]
    assert releases(method) == {p: 1.0 for layer in (head.last_layer, head.last_layer2) for p in layer.parameters()}


@pytest.mark.parametrize("name", ["shared", "own prototypes"])
def test_chance_is_the_loss_of_equal_features(name):
    method = built(name, mask_ratios=(0.3,), mask_variances=(0.2,))
    for heads in (method.student_heads, method.teacher_heads):
        for layer in (heads["head"].last_layer, heads["head"].last_layer2):
            if layer is not None:
                layer.weight_g.data.fill_(1.0)
                layer.weight_v.data[:] = layer.weight_v.data[:1]
    loss, _ = method(batch(method.config, 0), schedule())
    assert loss.item() == pytest.approx(method.chance_loss(IMAGES), rel=1e-6)
    patches = method.chance_loss(IMAGES) - math.log(24)
    assert built(name).chance_loss(IMAGES) == pytest.approx(math.log(24) + patches / 2)  # half of the crops hide


@pytest.mark.parametrize("name", ["shared", "own prototypes", "swin"])
def test_flops(name):
    method = built(name)
    config, head = method.config, method.student_heads["head"]
    mlp = 2 * (head.mlp[0].weight.numel() + head.mlp[2].weight.numel() + head.mlp[4].weight.numel())
    views, patches = 2 * 24 * 12, 2 * (17 if name == "own prototypes" else 24) * 12
    large = config.encoder.region_flops + mlp + views
    small = config.encoder.flops_at((config.local_size,) * 2) + mlp + views
    hidden, tokens = 0.15 * 16, 16
    student = 2 * (large + hidden * (mlp + patches)) + 3 * small
    teacher = 2 * (large + tokens * mlp + hidden * patches)
    assert method.flops(IMAGES) == pytest.approx(IMAGES * (3 * student + teacher), rel=1e-9)


def test_the_teacher():
    """It sees large crops alone, whole; its mask token follows the student's."""
    method = built("shared", encoder=replace(VIT, drop_path=0.3))
    seen = []
    method.teacher.register_forward_pre_hook(lambda module, args: seen.append((tuple(args[0].shape), args[3])))
    method(batch(method.config, 0), schedule())
    assert seen == [((2 * IMAGES, 16, 16, 3), None)]
    pairs = [dict(pair.teacher.named_parameters()).keys() for pair in method.momentum_pairs()]
    assert "mask_token" in pairs[0]
    assert method.backbone() is method.teacher


@pytest.mark.parametrize("encoder", [replace(VIT, mask_token=False), ResNetConfig(architecture="resnet18")])
def test_networks_without_a_mask_token_are_refused(encoder):
    with pytest.raises(ValueError, match=r"Config has none.*--method.encoder.mask-token"):
        IBOTConfig(encoder=encoder).build()
