"""DINOv2 against golden values of the released code and against its dense form."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import dense_losses
import dinov2_runs
import joint_runs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import training
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import gaussian_blur

from vitrail.engine.data import GaussianBlur
from vitrail.engine.data.pillow import apply
from vitrail.engine.methods.base import Schedule
from vitrail.engine.methods.centers import Centers, Distilled
from vitrail.engine.methods.dinov2 import DINOv2Config
from vitrail.engine.methods.schedules import warmed_temperature_by_step
from vitrail.engine.models.block import DropPath
from vitrail.engine.models.vit import ViTConfig, dinov2_vit, vit_giant, vit_large
from vitrail.engine.train.checkpoint import load_weights
from vitrail.engine.train.config import ConfigError
from vitrail.engine.train.ds import guarded_step, set_rates
from vitrail.engine.train.optimizers import build
from vitrail.engine.train.param_groups import parameter_groups, releases
from vitrail.recipes import dinov2_vitl14, dinov2_vitl14_518, dinov2_vitl16

STEPS, IMAGES = 4, 4
VIT = replace(dinov2_vit(ViTConfig(image_size=24, patch_size=4, width=32, depth=2, heads=4)), layer_scale=0.5)
SMALL = {"encoder": VIT, "prototypes": 24, "hidden": 20, "bottleneck": 12, "local_crops": 3, "local_size": 8}
OWN_HEAD = {"patch_prototypes": 18, "patch_bottleneck": 10}
CONFIGS = {
    "centering": DINOv2Config(**SMALL),
    "centering, own head": DINOv2Config(**SMALL, **OWN_HEAD),
    "centering, mean over masked": DINOv2Config(**SMALL, mean_over_masked=True, patch_weight=0.7),
    "sinkhorn": DINOv2Config(**SMALL, centering="sinkhorn", koleo_weight=0.0),
    "sinkhorn, own head": DINOv2Config(**SMALL, **OWN_HEAD, centering="sinkhorn"),
}


def g(shape, a, b=0.0):
    """sin(a i + b) of the flat index i."""
    return torch.sin(a * torch.arange(math.prod(shape), dtype=torch.float64) + b).float().view(shape)


def rows(values: torch.Tensor) -> Distilled:
    """Logits as features, whose prototypes are then the axes."""
    return Distilled(values, torch.eye(values.shape[1], dtype=values.dtype))


def batch(config, seed: int, images: int = 4):
    generator = torch.Generator().manual_seed(seed)
    sides = [config.encoder.size[0]] * 2 + [config.local_size] * config.local_crops
    return SimpleNamespace(
        views=[torch.randint(0, 256, (images, s, s, 3), dtype=torch.uint8, generator=generator) for s in sides]
    )


def schedule(step: int = 0, images: int = IMAGES, first_row: int = 0) -> Schedule:
    return Schedule(
        step=step, total_steps=STEPS, epoch=step / 2, seed=0, first_row=first_row, global_rows=max(images, IMAGES)
    )


def built(name: str, **changes):
    torch.manual_seed(1)
    method = replace(CONFIGS[name], **changes).build().double().train()
    for side in (method.student, method.teacher):  # which otherwise start from nothing that an image could change
        torch.manual_seed(2)
        for parameter in (side.cls_token, side.mask_token):
            torch.nn.init.normal_(parameter)
    return method


# --- the released code's numbers ------------------------------------------------------------------------------------


def test_golden_targets_and_losses():
    method = DINOv2Config(**SMALL | {"prototypes": 16}, centering="sinkhorn").build()
    student, teacher = rows(g((8, 16), 0.31)), rows(g((8, 16), 0.47, 0.5))
    center = method.balance(teacher, method.centers, 0.07)
    target = ((teacher.features - center) / 0.07).softmax(1)
    assert target[0, :4].tolist() == pytest.approx([0.00022212, 0.15842435, 0.27593595, 0.19240287], abs=5e-7)
    assert target[5, :4].tolist() == pytest.approx([0.00006908, 0.07477956, 0.23805088, 0.32054090], abs=5e-7)
    assert method.distil(student, teacher, 0.07, center).item() == pytest.approx(9.9719315, abs=3e-6)
    # three, none, one and four of six patches masked
    weight = torch.tensor([1 / 3] * 3 + [1.0] + [1 / 4] * 4) / 4
    assert method.patch_loss(student, teacher, 0.07, weight).item() == pytest.approx(8.8477097, abs=3e-6)
    full = (rows(torch.cat([x.features, 3 * g((5, 16), 0.9)])) for x in (student, teacher))
    padded = method.patch_loss(*full, 0.07, torch.cat([weight, torch.zeros(5)]))
    assert padded.item() == pytest.approx(8.8477097, abs=3e-6)


def test_golden_koleo():
    method = built("centering", local_crops=1)
    crop = g((8, 16), 0.61, 0.2)
    views = torch.cat([crop, crop, g((8, 16), 0.3)])
    assert method.koleo(views).item() == pytest.approx(2 * 0.4350618, abs=1e-6)


def test_temperature_rises_in_a_line_over_steps():
    table = np.linspace(0.04, 0.07, 37_500)
    for step in (0, 1, 20_000, 37_499, 37_500, 99_999):
        got = warmed_temperature_by_step(step, step / 1250, 0.04, 0.07, 30)
        assert got == pytest.approx(table[min(step, 37_499)], abs=1e-15)
    assert warmed_temperature_by_step(0, 0.0, 0.04, 0.07, 0) == 0.07


def test_keys_and_sizes_are_those_of_the_released_backbones():
    with torch.device("meta"):
        giant = dinov2_vit(vit_giant(image_size=518)).build()
        large = dinov2_vit(vit_large(14, 518)).build()
    assert sum(p.numel() for p in giant.parameters()) == 1_136_480_768
    assert giant.pos_embed.shape == (1, 1370, 1536)
    block = [f"{part}.{kind}" for part in ("norm1", "attn.qkv", "attn.proj") for kind in ("weight", "bias")]
    block += ["ls1.gamma", "norm2.weight", "norm2.bias"]
    outside = {"cls_token", "pos_embed", "mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    outside |= {"norm.weight", "norm.bias"}
    for network, mlp in ((giant, ("w12", "w3")), (large, ("fc1", "fc2"))):
        names = block + [f"mlp.{part}.{kind}" for part in mlp for kind in ("weight", "bias")] + ["ls2.gamma"]
        inside = {f"blocks.{i}.{name}" for i in range(len(network.blocks)) for name in names}
        assert network.state_dict().keys() == outside | inside


def test_names_of_heads():
    names = {key.split(".")[0] for key in built("sinkhorn, own head").student_heads.state_dict()}
    assert names == {"dino_head", "ibot_head"}
    assert list(built("centering").student_heads) == ["dino_head"]


# --- the dense form -------------------------------------------------------------------------------------------------


class Dense:
    """The losses as the released code computes them: all logits, image by image, pair by pair."""

    def __init__(self, method) -> None:
        self.method = copy.deepcopy(method)
        self.config = config = method.config
        sizes = config.prototypes, config.patch_prototypes or config.prototypes
        self.centers = [torch.zeros(size, dtype=torch.float64) for size in sizes]

    def logits(self, side: str, head: str, x: torch.Tensor) -> torch.Tensor:
        module = getattr(self.method, f"{side}_heads")[head]
        layer = module.last_layer
        weight = layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True) * layer.weight_g
        return F.normalize(module.mlp(x), dim=-1) @ weight.T

    def targets(self, number: int, logits: torch.Tensor, temperature: float) -> torch.Tensor:
        if self.config.centering == "sinkhorn":
            return dense_losses.sinkhorn(logits, temperature)
        return ((logits - self.centers[number]) / temperature).softmax(1)

    def loss(self, crops, masks, step: int):
        m, config = self.method, self.config
        temperature = warmed_temperature_by_step(
            step, step / 2, config.warmup_teacher_temp, config.teacher_temp, config.warmup_teacher_temp_epochs
        )
        masks = masks.chunk(2)
        student = [m.student.forward_regions(crop, mask) for crop, mask in zip(crops, masks, strict=False)]
        student += [m.student.forward_regions(crop) for crop in crops[2:]]
        with torch.no_grad():
            teacher = [m.teacher.forward_regions(crop) for crop in crops[:2]]
            raw = torch.cat([self.logits("teacher", "dino_head", x) for x, _ in teacher])
            q = self.targets(0, raw, temperature).chunk(2)
        views = 0.0
        for i in range(2):
            for v, (x, _) in enumerate(student):
                if v != i:
                    log = F.log_softmax(self.logits("student", "dino_head", x) / config.student_temp, dim=-1)
                    views = views - (q[i] * log).sum(-1).mean()
        views = views / (2 * len(crops) - 2)
        koleo = 0.0
        for x, _ in student[:2]:
            unit = F.normalize(x, dim=-1)
            nearest = (unit @ unit.T).fill_diagonal_(-1).argmax(1)
            koleo = koleo - torch.log(F.pairwise_distance(unit, unit[nearest], eps=1e-8) + 1e-8).mean()
        patches = self.patches(student, teacher, masks, temperature)
        if config.centering == "centering":
            self.centers[0] = 0.9 * self.centers[0] + 0.1 * raw.mean(0)
        return views + config.patch_weight * patches + config.koleo_weight * koleo

    def patches(self, student, teacher, masks, temperature: float):
        config = self.config
        head = "dino_head" if config.patch_prototypes is None else "ibot_head"
        pairs = [
            (ours[mask], theirs[mask])
            for crop, mask in enumerate(masks)
            for ours, theirs, mask in zip(student[crop][1], teacher[crop][1], mask, strict=True)
        ]
        with torch.no_grad():
            raw = self.logits("teacher", head, torch.cat([theirs for _, theirs in pairs]))
            q = self.targets(1, raw, temperature).split([len(ours) for ours, _ in pairs])
        total = 0.0
        for (ours, _), target in zip(pairs, q, strict=True):
            if len(ours):
                log = F.log_softmax(self.logits("student", head, ours) / config.student_temp, dim=-1)
                share = 1 / torch.tensor(float(len(ours)), dtype=torch.float32)  # the method's weights are float32
                total = total - share.double() * (target * log).sum()
        if config.centering == "centering":
            self.centers[1] = 0.9 * self.centers[1] + 0.1 * raw.mean(0)
        return total / (len(pairs) / 2 if config.mean_over_masked else len(pairs))


@torch.no_grad()
def advance(method) -> None:
    """A step of gradient descent, which the teacher follows."""
    for p in method.parameters():
        if p.grad is not None:
            p -= 0.2 * p.grad
            p.grad = None
    for pair in method.momentum_pairs():
        for p, q in zip(pair.teacher.parameters(), pair.student.parameters(), strict=True):
            p.lerp_(q, 0.4)


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_are_those_of_the_dense_form(name):
    """Losses, all gradients and centres over steps in which student and teacher part; some rows are padding."""
    method = built(name)
    dense = Dense(method)
    hide = method.hide

    def padded(*args):
        hidden = hide(*args)
        return hidden._replace(
            rows=torch.cat([hidden.rows, hidden.rows.new_zeros(7)]),
            weight=torch.cat([hidden.weight, torch.zeros(7)]),
        )

    method.hide = padded
    for step in range(STEPS - 1):
        views = batch(method.config, step).views
        hidden = hide(IMAGES, schedule(step), torch.device("cpu"))
        empty = ~hidden.masks.any(1)
        assert empty.sum() == IMAGES  # of 2 IMAGES crops
        ours, metrics = method(SimpleNamespace(views=views), schedule(step))
        theirs = dense.loss(views, hidden.masks, step)
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
        assert metrics["masked"] == pytest.approx(hidden.masks.float().mean().item())
        ours.backward()
        theirs.backward()
        for key, p in method.named_parameters():
            other = dense.method.get_parameter(key)
            assert (p.grad is None) == (other.grad is None), key
            if p.grad is not None:
                torch.testing.assert_close(p.grad, other.grad, rtol=1e-6, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")
        for one in (method, dense.method):
            advance(one)
        method.after_step(True)
        for centers, expected in zip((method.centers, method.patch_centers), dense.centers, strict=True):
            if method.config.centering == "centering":
                torch.testing.assert_close(centers.value[0], expected, rtol=1e-6, atol=1e-9)
                assert centers.value.abs().max() > 0


def test_one_sequence_is_the_same_as_a_pass_for_each_size():
    packed, plain = built("sinkhorn, own head"), built("sinkhorn, own head", pack_crops=False)
    losses = [m(batch(plain.config, 0), schedule())[0] for m in (plain, packed)]
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-10)
    for loss in losses:
        loss.backward()
    for key, p in plain.student.named_parameters():
        torch.testing.assert_close(p.grad, packed.student.get_parameter(key).grad, rtol=1e-7, atol=1e-10)
    equal = built("centering", local_size=24)  # local crops of the global ones' size are not masked
    equal(batch(equal.config, 0), schedule())


# --- masks and centres ----------------------------------------------------------------------------------------------


def test_masks_are_spread_over_the_global_batch():
    method, images, host = built("centering"), 50, torch.device("cpu")
    tokens, masked = 36, 50
    whole = method.hide(images, schedule(3, images), host)
    parts = [
        method.hide(25, schedule(3, images, first_row=first), host).masks.unflatten(0, (2, 25)) for first in (0, 25)
    ]
    assert torch.equal(torch.cat(parts, dim=1).flatten(0, 1), whole.masks)
    counts = whole.masks.sum(1).sort().values
    assert (counts == 0).sum() == 2 * images - masked
    edges = torch.linspace(0.1, 0.5, masked + 1).double()
    least = (edges * tokens).long()
    assert (counts[images:] <= least[1:]).all()  # the i-th smallest draws from the i-th part
    assert (counts[images:] >= least[:-1] - 3).all()  # of which rectangles may leave some out
    assert counts[images:].float().mean() == pytest.approx(0.3 * tokens, rel=0.1)
    assert not torch.equal(method.hide(images, schedule(2, images), host).masks, whole.masks)
    sums = torch.zeros(2 * images * tokens).index_add(0, whole.rows, whole.weight * 2 * images).view(2 * images, -1)
    torch.testing.assert_close(sums.sum(1), (whole.masks.sum(1) > 0).float())
    assert not sums[~whole.masks].any()
    # A micro-batch of which nothing is hidden still has one place.
    nothing = built("centering", masked_share=0.0)
    hidden = nothing.hide(IMAGES, schedule(), host)
    assert hidden.rows.tolist() == [0]
    loss, metrics = nothing(batch(nothing.config, 0), schedule())
    loss.backward()
    assert metrics["patch_loss"] == 0
    assert all(p.grad.isfinite().all() for p in nothing.student.parameters())


def test_padding_does_not_move_a_centre_and_counts_weigh():
    prototypes = g((5, 3), 0.7).double()
    features = g((6, 3), 0.3).double()
    centers = Centers(1, 5, 0.9).double()
    first = torch.tensor([True, True, False])
    for part, valid in ((features[:3], first), (features[3:], None)):
        centers.observe(rows(part)._replace(prototypes=prototypes), valid=valid)
    centers.settle(True)
    counted = torch.cat([features[:2], features[3:]])
    torch.testing.assert_close(centers.value[0], 0.1 * prototypes @ counted.mean(0))


# --- what the method says of itself ---------------------------------------------------------------------------------


def test_the_teacher():
    method = built("centering", encoder=replace(VIT, drop_path=0.3))
    rates = [[m.rate for m in side.modules() if isinstance(m, DropPath)] for side in (method.student, method.teacher)]
    assert rates == [[0.3, 0.3], [0.0, 0.0]]
    shapes = []
    method.teacher.register_forward_pre_hook(lambda module, args: shapes.append((tuple(args[0].shape), args[3:])))
    method(batch(method.config, 0), schedule())
    assert shapes == [((2 * IMAGES, 24, 24, 3), (None,))]
    images = batch(method.config, 0).views[0]
    assert torch.equal(method.features(images), method.teacher.forward_features(images).float())
    assert method.backbone() is method.teacher
    own = built("sinkhorn, own head")
    held = {p for head in own.student_heads.values() for p in head.last_layer.parameters()}
    assert releases(own) == dict.fromkeys(held, 1.0)
    assert len(held) == 4


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"has none: pass --method.encoder.mask-token"):
        built("centering", encoder=replace(VIT, mask_token=False))
    with pytest.raises(ValueError, match=r"no statistics in common; pass --method.no-head-batch-norm"):
        built("centering", head_batch_norm=True)


@pytest.mark.parametrize("name", ["centering", "sinkhorn, own head"])
def test_chance_is_the_loss_of_uniform_outputs(name):
    method = built(name, koleo_weight=0.0, patch_weight=0.5)
    for heads in (method.student_heads, method.teacher_heads):
        for head in heads.values():
            head.last_layer.weight_v.data[:] = head.last_layer.weight_v.data[:1]
    loss, _ = method(batch(method.config, 0), schedule())
    assert loss.item() == pytest.approx(method.chance_loss(IMAGES), rel=1e-6)
    assert method.compares_images == (name != "centering")


@pytest.mark.parametrize("pack", [False, True])
def test_flops_are_those_that_a_step_runs(pack):
    """But attention, which is not in the counter's list, and the loss."""
    method = built("sinkhorn, own head", pack_crops=pack).float()
    config, crops = method.config, batch(CONFIGS["centering"], 0).views
    hidden = method.hide(IMAGES, schedule(), torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        method.encode_masked(crops, hidden.masks)
    local = config.encoder.flops_at((8, 8), regions=pack)
    backbone = 2 * config.encoder.region_flops + 3 * local
    assert counter.get_total_flops() == pytest.approx(IMAGES * backbone, rel=0.1)
    views, patches = (
        2 * sum(p.numel() for p in head.parameters() if p.dim() == 2 and p.shape[1] > 1)
        for head in method.student_heads.values()
    )
    heads = 5 * views + 2 * 0.5 * 0.3 * 36 * patches
    teacher = 2 * config.encoder.region_flops + 2 * views + 2 * 0.5 * 0.3 * 36 * patches
    assert method.flops(IMAGES) == pytest.approx(IMAGES * (3 * (backbone + heads) + teacher))
    dropped = built("sinkhorn, own head", pack_crops=pack, encoder=replace(VIT, drop_path=0.5))
    stem = sum(2 * count * 48 * 32 for count in (36, 36, 4, 4, 4))
    assert method.flops(1) - dropped.flops(1) == pytest.approx(3 * 0.5 * (backbone - stem))


def test_views_and_the_released_codes_blur():
    config = replace(CONFIGS["centering"], local_crops=2)
    for flag, expected in ((False, [1.0, 0.1, 0.5, 0.5]), (True, [None, 0.9, 0.5, 0.5])):
        views = replace(config, dinov2_blur=flag).build().views()
        blurs = [next((op for op in view.ops if isinstance(op, GaussianBlur)), None) for view in views]
        assert [blur and blur.p for blur in blurs] == expected
        assert {blur.window for blur in blurs if blur} == {9}
        assert [view.size for view in views] == [(24, 24)] * 2 + [(8, 8)] * 2
        assert [view.ops[0].scale for view in views] == [(0.32, 1.0)] * 2 + [(0.05, 0.32)] * 2


def test_the_blurs_kernel_is_torchvisions():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 21, 3), np.uint8)
    for sigma in (0.1, 0.7, 2.0):
        ours = apply(GaussianBlur(window=9), Image.fromarray(pixels), np.array([sigma], np.float32))
        theirs = gaussian_blur(Image.fromarray(pixels), [9, 9], [sigma, sigma])
        difference = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs))
        assert difference.max() <= 1  # a sum that lies between two levels
        assert difference.mean() < 1e-3


# --- recipes, rates and clipping ------------------------------------------------------------------------------------


def test_recipes_hold_the_published_settings():
    short, long, large = (module.recipe() for module in (dinov2_vitl16, dinov2_vitl14, dinov2_vitl14_518))
    assert short.peak_lr == pytest.approx(4e-3 * 2**0.5)
    assert long.peak_lr == pytest.approx(2e-4 * 3**0.5)
    for config, steps, images in (
        (short, 125_000, 1_281_167),
        (long, 625_000, 14_197_122),
        (large, 10_000, 14_197_122),
    ):
        per_epoch = images // config.train.batch_size
        assert math.ceil(config.train.epochs * per_epoch) == steps
        warmup, heating, held = (0.1, 0.3, 0.01) if config is short else (0.16, 0.06, 0.002)
        assert round(config.optim.warmup_epochs * per_epoch) == warmup * steps
        assert config.method.warmup_teacher_temp_epochs / config.train.epochs == pytest.approx(heating)
        assert config.method.freeze_last_layer / config.train.epochs == pytest.approx(held)
    assert large.method.encoder.grid == (37, 37)
    assert (large.method.local_size, long.method.local_size, short.method.local_size) == (98, 98, 96)


def test_weights_go_on_at_another_resolution(tmp_path):
    """Of student and teacher; with larger images the networks start from what those for smaller ones would do."""
    small = built("sinkhorn, own head").float()
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    large = built("sinkhorn, own head", encoder=replace(VIT, image_size=40)).float()
    assert load_weights(large, tmp_path / "small.safetensors") == ["student.pos_embed", "teacher.pos_embed"]
    images = torch.randint(0, 256, (2, 40, 40, 3), dtype=torch.uint8)
    for side in ("student", "teacher"):
        networks = (getattr(method, side).eval() for method in (small, large))
        torch.testing.assert_close(*(network(images) for network in networks), rtol=1e-5, atol=1e-5)
    large(batch(large.config, 0), schedule())[0].backward()
    assert load_weights(small, tmp_path / "small.safetensors") == []
    wide = built("sinkhorn, own head", encoder=replace(VIT, width=48, image_size=40)).float()
    with pytest.raises(ConfigError, match=r"other shapes:.*student.pos_embed \(1, 37, 32\) instead of \(1, 101, 48\)"):
        load_weights(wide, tmp_path / "small.safetensors")


def test_rates_fall_towards_the_pixels():
    config = replace(dinov2_vitl16.recipe(), method=CONFIGS["centering, own head"])
    method = config.method.build()
    groups = parameter_groups(method, config)
    names = {p: name for name, p in method.named_parameters()}
    scale = {names[p]: group.get("lr_scale", 1.0) for group in groups for p in group["params"]}
    first = 0.9**3
    expected = {
        "student.patch_embed.proj.weight": 0.2 * first,
        **{f"student.{token}": first for token in ("cls_token", "mask_token", "pos_embed")},
        "student.blocks.0.attn.qkv.bias": 0.9**2,
        "student.blocks.1.ls2.gamma": 0.9,
        "student.norm.weight": 1.0,
        "student_heads.ibot_head.last_layer.weight_g": 1.0,
    }
    assert {name: scale[name] for name in expected} == pytest.approx(expected)
    part = {names[p].split(".")[0 if "heads" not in names[p] else 1]: group["clip_part"]
            for group in groups for p in group["params"]}  # fmt: skip
    assert part == {"student": 1, "dino_head": 2, "ibot_head": 3}
    for group in groups:
        for p in group["params"]:
            assert (group["weight_decay"] > 0) == (p.dim() > 1), names[p]
    engine = SimpleNamespace(optimizer=SimpleNamespace(param_groups=groups))
    set_rates(engine, 2.0, 0.3)
    assert all(group["lr"] == 2.0 * scale[names[group["params"][0]]] for group in groups)
    whole = replace(config, optim=replace(config.optim, clip_per_part=False))
    assert not any("clip_part" in group for group in parameter_groups(method, whole))


@pytest.mark.parametrize("implementation", ["vitrail", "torch"])
def test_each_part_is_clipped_by_its_own_norm(implementation):
    """In one process; the launched runs compare the stages with this one."""
    base = dinov2_vitl16.recipe()
    name = "adamw" if implementation == "vitrail" else "sgd"
    optim = replace(base.optim, name=name, clip=0.5, weight_decay=0.0, final_weight_decay=None, eps=1e3, momentum=0.0)
    config = replace(base, method=CONFIGS["centering, own head"], optim=optim)
    method = config.method.build()
    before = copy.deepcopy(method)
    optimizer = build(implementation, optim, parameter_groups(method, config), {})
    engine = SimpleNamespace(
        optimizer=optimizer,
        step=optimizer.step,
        zero_optimization_stage=lambda: 0,
        is_gradient_accumulation_boundary=lambda: True,
    )
    set_rates(engine, 1e3 if name == "adamw" else 1.0)
    for i, group in enumerate(method.clip_groups()):
        for p in group:
            p.grad = torch.full_like(p, (0.0, 1e-3, 1.0)[i] + 1e-9)
    norms = [sum(p.grad.square().sum().item() for p in group) ** 0.5 for group in method.clip_groups()]
    assert norms[1] < 0.5 < norms[2]
    taken = guarded_step(engine, optim)
    assert taken.applied
    assert taken.norm.item() == pytest.approx(math.hypot(*norms), rel=1e-4)
    for i, (now, then) in enumerate(zip(method.clip_groups(), before.clip_groups(), strict=True)):
        step = sum((p - q).double().square().sum().item() for p, q in zip(now, then, strict=True)) ** 0.5
        assert step == pytest.approx(min(norms[i], 0.5) if i else step, rel=1e-2)


# --- in the trainer -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return launched(tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launched(tmp_path_factory.mktemp("two"), 2)


def launched(folder, ranks):
    """Reports and final weights of runs on some ranks."""
    reports = training.run_case("runs", folder, ranks=ranks, script=dinov2_runs.__file__)
    return reports, {path.stem: load_file(path) for path in folder.glob("*.safetensors")}


RUNS = [(1, f"balanced {how}") for how in ("0", "3", "recomputed")]
RUNS += [(2, f"balanced{how}") for how in ("", " 0", " 2", " 3")] + [(1, "centred accumulated"), (2, "centred")]


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "name"), RUNS)
def test_runs_are_those_of_one_rank(one, two, ranks, name):
    """In any stage, on any number of ranks, recomputed or accumulated, up to the order of sums in float32."""
    (reports, weights), (plain, others) = (one if ranks == 1 else two), one
    other = name.split()[0]
    for figure in ("loss", "gradient_norm"):
        assert len(reports[name][figure]) == joint_runs.STEPS
        assert reports[name][figure] == pytest.approx(plain[other][figure], rel=1e-4), figure
    assert min(plain[other]["gradient_norm"]) > 2 * dinov2_runs.CLIP
    torch.manual_seed(0)  # the runs' seed
    start = dinov2_runs.METHODS[other].build().state_dict()
    for kind in ("student.", "student_heads.", "teacher.", "teacher_heads.", "centers", "patch_centers"):
        keys = [key for key in start if key.startswith(kind)]
        difference = sum((weights[name][k] - others[other][k]).square().sum().item() for k in keys)
        moved = sum((others[other][k] - start[k]).square().sum().item() for k in keys)
        assert difference**0.5 <= 1e-3 * moved**0.5, kind
        assert (moved > 0) == (other == "centred" or "centers" not in kind)


@pytest.mark.launch
@pytest.mark.slow
def test_interrupted_runs_continue_exactly(one):
    reports, weights = one
    assert reports["koleo parts"]["loss"] == reports["koleo"]["loss"]
    assert all(torch.equal(value, weights["koleo parts"][key]) for key, value in weights["koleo"].items())
    assert reports["koleo"]["loss"] != reports["centred"]["loss"]
