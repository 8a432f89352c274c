"""DINO and EsViT against golden values of the released codes and against their dense form."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import dense_losses
import golden_models
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitrail.engine.methods.base import Schedule
from vitrail.engine.methods.centers import Distilled
from vitrail.engine.methods.dino import DINOConfig
from vitrail.engine.methods.esvit import EsViTConfig, encode_regions
from vitrail.engine.methods.schedules import warmed_temperature
from vitrail.engine.models.block import DropPath
from vitrail.engine.models.heads import DINOHead
from vitrail.engine.models.positions import resize_positions
from vitrail.engine.models.resnet import ResNetConfig
from vitrail.engine.models.swin import SwinConfig
from vitrail.engine.models.vit import ViTConfig, dino_vit, vit_tiny
from vitrail.engine.train.param_groups import releases
from vitrail.kernels import region_match_crops

STEPS, IMAGES = 4, 3
VIT = dino_vit(ViTConfig(image_size=16, patch_size=4, width=32, depth=2, heads=4))
SWIN = SwinConfig(image_size=32, width=16, depths=(2, 2), heads=(2, 2), window=3)
SMALL = {"prototypes": 24, "hidden": 20, "bottleneck": 12, "local_crops": 3}
CONFIGS = {
    "dino": DINOConfig(encoder=VIT, local_size=8, **SMALL),
    "dino, trained lengths": DINOConfig(encoder=VIT, local_size=8, norm_last_layer=False, **SMALL),
    "esvit": EsViTConfig(encoder=SWIN, local_size=16, **SMALL),
    "esvit of a ViT": EsViTConfig(encoder=replace(VIT, position_offset=0.0), local_size=8, **SMALL),
    "esvit, views alone": EsViTConfig(encoder=SWIN, local_size=16, region_loss=False, **SMALL),
    "dino, sinkhorn": DINOConfig(encoder=VIT, local_size=8, centering="sinkhorn", **SMALL),
    "esvit, sinkhorn": EsViTConfig(encoder=SWIN, local_size=16, centering="sinkhorn", **SMALL),
    "esvit, no local crops": EsViTConfig(encoder=SWIN, local_size=16, **{**SMALL, "local_crops": 0}),
}


def g(shape, a, b=0.0):
    """sin(a i + b) of the flat index i."""
    return torch.sin(a * torch.arange(math.prod(shape), dtype=torch.float64) + b).float().view(shape)


def schedule(step: int = 0, epoch: float | None = None) -> Schedule:
    where = step / 2 if epoch is None else epoch
    return Schedule(step=step, total_steps=STEPS, epoch=where, seed=0, first_row=0, global_rows=IMAGES)


def batch(config, seed: int, images: int = IMAGES):
    generator = torch.Generator().manual_seed(seed)

    def crops(count, height, width):
        return [
            torch.randint(0, 256, (images, height, width, 3), dtype=torch.uint8, generator=generator)
            for _ in range(count)
        ]

    side = config.local_size
    return SimpleNamespace(views=crops(2, *config.encoder.size) + crops(config.local_crops, side, side))


def built(name: str, **changes):
    torch.manual_seed(1)
    return replace(CONFIGS[name], **changes).build().double().train()


def rows(values: torch.Tensor) -> Distilled:
    """Logits as features, whose prototypes are then the axes."""
    return Distilled(values, torch.eye(values.shape[1]))


def test_golden_dino():
    config = DINOConfig(
        prototypes=32, norm_last_layer=False, teacher_temp=0.07, warmup_teacher_temp_epochs=30, encoder=VIT, hidden=8
    )
    method = config.build()
    student, teacher = g((16, 32), 0.31).requires_grad_(), g((8, 32), 0.47, 0.5)

    def step(epoch):
        loss = method.view_loss(rows(student), rows(teacher), crops=4, epoch=epoch)
        method.centers.observe(rows(teacher))
        method.after_step(True)
        return loss

    first = step(0)
    first.backward()
    assert first.item() == pytest.approx(11.3188887, abs=2e-6)
    assert student.grad[0, :4].tolist() == pytest.approx(
        [3.6504962e-6, 7.7126722e-5, 1.2183033e-3, 1.1059693e-2], rel=2e-5
    )
    assert student.grad.abs().sum().item() == pytest.approx(17.8282509, rel=1e-6)
    assert method.centers.value[0, :4].tolist() == pytest.approx(
        [-0.00158059306, 0.00120701722, 0.00373286544, 0.00544919400], rel=1e-5
    )
    assert step(0).item() == pytest.approx(11.3164549, abs=2e-6)
    assert step(50).item() == pytest.approx(11.3285952, abs=2e-6)


def test_golden_esvit():
    config = EsViTConfig(prototypes=32, encoder=SWIN, hidden=8)
    method = config.build()
    student, teacher = g((8, 32), 0.31), g((4, 32), 0.47, 0.5)
    student_regions, teacher_regions = g((52, 32), 0.29, 0.2), g((36, 32), 0.43, 0.3)
    match, _ = region_match_crops(g((52, 8), 0.41, 0.1), g((36, 8), 0.59, 0.7), [9, 9, 4, 4], [9, 9])
    # the second student crop is the other large one: its regions are rows 18 to 36; the third's follow
    assert (match[0, 36:44].view(2, 4) % 9).tolist() == [[6, 8, 1, 3], [0, 2, 0, 2]]
    losses = []
    for _ in range(2):
        views = method.view_loss(rows(student), rows(teacher), crops=4, epoch=0)
        regions = method.region_loss(rows(student_regions), rows(teacher_regions), match, [9, 9, 4, 4], epoch=0)
        losses.append((0.5 * views + 0.5 * regions).item())
        method.centers.observe(rows(teacher), rows(teacher_regions))
        method.after_step(True)
    assert losses == pytest.approx([10.6506243, 10.6361895], abs=3e-6)
    assert method.centers.value[1, :4].tolist() == pytest.approx(
        [0.00327239, 0.00165656, -0.00026088, -0.00213082], abs=1e-8
    )


def test_temperature_is_constant_within_an_epoch():
    table = [warmed_temperature(epoch, 0.04, 0.07, 30) for epoch in (0, 0.9, 1, 15, 29, 29.9, 30, 99)]
    assert table == pytest.approx([0.04, 0.04, 0.04103448, 0.05551724, 0.07, 0.07, 0.07, 0.07], abs=5e-9)
    assert warmed_temperature(0, 0.04, 0.07, 1) == 0.04
    assert warmed_temperature(0, 0.04, 0.07, 0) == 0.07


def test_momentum():
    method = built("dino")
    for step, expected in ((1, 0.996000000000631), (62550, 0.998), (125099, 0.999999999999369)):
        taken = replace(schedule(), step=step, total_steps=125100)
        assert method.ema_momentum(taken, replace(taken, step=step + 1)) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (224, (-0.100228, 0.284778, 0.076116, -0.903310, 1.48134, 13.684108)),
        (96, (-0.304748, 0.351801, -0.402650, -0.750826, 1.84197, 13.693232)),
    ],
)
def test_golden_vit(size, expected):
    """The released ViT-Ti/16's class token; crops of 96 pixels read the shifted positions."""
    vit = dino_vit(vit_tiny()).build(mean=(0.0,) * 3, std=(1.0,) * 3).eval()  # the image is normalised
    golden_models.fill_(vit.state_dict())
    with torch.no_grad():
        out = vit.forward_features(golden_models.image(size))
        tokens, regions = vit.forward_regions(golden_models.image(size))
        packed = vit.forward_packed([golden_models.image(size), golden_models.image(224)])
    assert golden_models.summary(out) == pytest.approx(expected, abs=3e-5)
    torch.testing.assert_close(tokens, out, rtol=1e-5, atol=1e-5)
    assert regions.shape == (1, (size // 16) ** 2, 192)
    torch.testing.assert_close(packed[:1], out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        (0.1, (0.010972, 0.434526, 0.549865, 0.342574)),
        (0.0, (-0.035731, 0.237247, 0.655811, 0.571397)),
    ],
)
def test_golden_positions(offset, expected):
    table = g((1, 197, 8), 0.13)
    resized = resize_positions(table, (14, 14), (6, 6), offset=offset)
    channel = resized[0, 1:, 0].view(6, 6)
    assert [channel[at].item() for at in ((0, 0), (0, 5), (5, 0), (2, 3))] == pytest.approx(expected, abs=1e-6)
    assert torch.equal(resized[:, :1], table[:, :1])
    assert resize_positions(table, (14, 14), (14, 14), offset=offset) is table
    assert resize_positions(table, (14, 14), (3, 7), offset=offset).shape == (1, 22, 8)


def test_positions_of_small_crops_teach_the_table():
    vit = VIT.build().double()
    small = torch.randint(0, 256, (2, 8, 12, 3), dtype=torch.uint8)
    (vit.forward_features(small) * torch.arange(32)).sum().backward()
    assert vit.pos_embed.grad[0, 1:].abs().sum(-1).gt(0).float().mean() > 0.9


def test_published_heads():
    with torch.device("meta"):
        for width, count in ((384, 22_352_128), (768, 23_138_560), (1024, 23_662_848)):
            head = DINOHead(width)
            # the lengths, frozen or not, are counted by the released code
            assert sum(p.numel() for p in head.parameters()) == count
        assert list(head.state_dict()) == [
            *(f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")),
            "last_layer.weight_g",
            "last_layer.weight_v",
        ]
        assert "mlp.6.weight" in DINOHead(384, batch_norm=True).state_dict()
    torch.manual_seed(0)
    head = DINOHead(64, 4096, hidden=128)
    assert head.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not head.mlp[0].bias.any()
    direction = head.last_layer.weight_v
    assert 0.99 / 16 < direction.abs().max() <= 1 / 16
    features, prototypes = head(torch.randn(5, 64))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(4096))
    expected = nn.utils.weight_norm(nn.Linear(256, 4096, bias=False), dim=0)
    expected.weight_v.data, expected.weight_g.data = direction.data, torch.full((4096, 1), 1.5)
    head.last_layer.weight_g.data.fill_(1.5)
    with torch.no_grad():
        torch.testing.assert_close(features @ head.last_layer().T, expected(features), rtol=1e-5, atol=1e-6)


class Dense:
    """The loss as the released codes compute it: all logits, one pair of crops at a time, crops one by one."""

    def __init__(self, method) -> None:
        self.method = copy.deepcopy(method)
        self.config = method.config
        self.centers = torch.zeros(len(method.config.heads), method.config.prototypes, dtype=torch.float64)

    def logits(self, side: str, head: str, x: torch.Tensor) -> torch.Tensor:
        module = getattr(self.method, f"{side}_heads")[head]
        layer = module.last_layer
        weight = layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True) * layer.weight_g
        return F.normalize(module.mlp(x), dim=-1) @ weight.T

    def targets(self, head: int, raw: list[torch.Tensor], temperature: float) -> list[torch.Tensor]:
        """Of each large crop; Sinkhorn-Knopp balances both together."""
        if self.config.centering == "sinkhorn":
            rows = torch.cat([logits.flatten(0, -2) for logits in raw])
            both = dense_losses.sinkhorn(rows, temperature).chunk(2)
            return [target.view_as(logits) for target, logits in zip(both, raw, strict=True)]
        return [F.softmax((logits - self.centers[head]) / temperature, dim=-1) for logits in raw]

    def loss(self, crops, epoch: float):
        m, config = self.method, self.config
        temperature = warmed_temperature(
            epoch, config.warmup_teacher_temp, config.teacher_temp, config.warmup_teacher_temp_epochs
        )
        student = [m.student.forward_regions(crop) for crop in crops]
        with torch.no_grad():
            teacher = [m.teacher.forward_regions(crop) for crop in crops[:2]]
            raw = [[self.logits("teacher", h, x[i]) for x in teacher] for i, h in enumerate(config.heads)]
            targets = [self.targets(i, ts, temperature) for i, ts in enumerate(raw)]
        total, pairs = 0.0, 0
        for i, (_, theirs) in enumerate(teacher):
            for v, (pooled, ours) in enumerate(student):
                if v == i:
                    continue
                pairs += 1
                log = F.log_softmax(self.logits("student", "head", pooled) / config.student_temp, dim=-1)
                term = -(targets[0][i] * log).sum(-1)
                if len(config.heads) == 2:
                    cosine = F.normalize(ours, dim=-1) @ F.normalize(theirs, dim=-1).transpose(1, 2)
                    matched = targets[1][i].gather(1, cosine.argmax(-1)[..., None].expand(-1, -1, config.prototypes))
                    log = F.log_softmax(self.logits("student", "head_dense", ours) / config.student_temp, dim=-1)
                    term = 0.5 * term + 0.5 * -(matched * log).sum(-1).mean(-1)
                total = total + term.mean()
        means = torch.stack([torch.cat([t.flatten(0, -2) for t in ts]).mean(0) for ts in raw])
        self.centers = 0.9 * self.centers + 0.1 * means
        return total / pairs


def descend(parameters, lr: float = 0.5) -> None:
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


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_are_those_of_the_dense_form(name):
    """Losses, all gradients and centres over three steps in which student and teacher part."""
    method = built(name)
    dense = Dense(method)
    for step in range(STEPS - 1):
        views = batch(method.config, step).views
        ours, metrics = method(SimpleNamespace(views=views), schedule(step))
        theirs = dense.loss(views, step / 2)
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
        assert metrics["feature_std"] > 0
        ours.backward()
        theirs.backward()
        for key, p in method.named_parameters():
            other = dense.method.get_parameter(key)
            assert (p.grad is None) == (other.grad is None), key
            if p.grad is not None:
                torch.testing.assert_close(p.grad, other.grad, rtol=1e-6, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")
        for one in (method, dense.method):
            descend(one.parameters())
            follow(one, 0.6)
        method.after_step(True)
        if method.config.centering == "centering":
            torch.testing.assert_close(method.centers.value, dense.centers, rtol=1e-6, atol=1e-9)
            assert method.centers.value.abs().max() > 0
        else:
            assert not len(method.centers.value)
    assert method.compares_images == (method.config.centering == "sinkhorn")


def test_regions_of_every_crop():
    method = built("esvit")
    encoded = encode_regions(method.student, batch(method.config, 0).views)
    assert encoded.tokens == [16, 16, 4, 4, 4]
    assert encoded.views.shape == (5 * IMAGES, 32)
    assert encoded.regions.shape == (IMAGES * (2 * 16 + 3 * 4), 32)


def test_micro_batches_move_the_centre_once():
    """As one batch would; a step that is not applied does not move it, and leaves nothing behind."""
    whole, parts = built("esvit"), built("esvit")
    views = batch(whole.config, 0, images=4).views
    whole(SimpleNamespace(views=views), schedule())
    whole.after_step(True)
    parts(SimpleNamespace(views=[torch.flip(v, (0,)) for v in views]), schedule())
    parts.after_step(False)
    assert not parts.centers.value.any()
    for half in (slice(0, 2), slice(2, 4)):
        parts(SimpleNamespace(views=[v[half] for v in views]), schedule())
        assert not parts.centers.value.any()
    parts.after_step(True)
    torch.testing.assert_close(parts.centers.value, whole.centers.value)
    before = parts.centers.value.clone()
    parts.after_step(True)
    assert torch.equal(parts.centers.value, before)


def test_packed_crops_are_the_same_images():
    plain, packed = built("dino"), built("dino", pack_crops=True)
    losses = [m(batch(plain.config, 0), schedule())[0] for m in (plain, packed)]
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-10)
    for loss in losses:
        loss.backward()
    for key, p in plain.student.named_parameters():
        torch.testing.assert_close(p.grad, packed.student.get_parameter(key).grad, rtol=1e-7, atol=1e-10)
    with pytest.raises(ValueError, match=r"SwinTransformer has none.*--method.no-pack-crops"):
        DINOConfig(encoder=SWIN, pack_crops=True).build()
    with pytest.raises(ValueError, match=r"EsViT reads all tokens.*--method.no-pack-crops"):
        built("esvit", pack_crops=True)


def test_packed_images_are_dropped_whole():
    """Stochastic depth draws one number for each image, not for each token or sequence."""
    vit = replace(VIT, drop_path=0.5).build().double().train()
    images = [torch.randint(0, 256, (64, side, side, 3), dtype=torch.uint8) for side in (16, 8)]
    torch.manual_seed(0)
    out = vit.forward_packed(images)
    vit.eval()
    calm = vit.forward_packed(images)
    changed = (out - calm).abs().amax(1) > 1e-9
    assert changed.any()
    drop = DropPath(0.5).train()
    from vitrail.engine.models.packing import Packing

    packing = Packing(((50, 5), (50, 2)))
    kept = drop(torch.ones(1, 350, 3), packing)[0, :, 0]
    per_image = torch.cat([kept[:250].view(50, 5), kept[250:].view(50, 2).repeat(1, 3)[:, :5]])
    assert all(len(set(row)) == 1 for row in per_image.tolist())
    assert 0 < (per_image[:, 0] > 0).float().mean() < 1
    assert drop(torch.ones(1, 100, 3), packing).shape == (1, 100, 3)


def test_the_teacher():
    """Equal to the student at the start, without gradient and stochastic depth, and never sees small crops."""
    method = built("dino", encoder=replace(VIT, drop_path=0.3))
    for pair in method.momentum_pairs():
        for (name, p), q in zip(pair.teacher.named_parameters(), pair.student.parameters(), strict=True):
            assert torch.equal(p, q), name
            assert not p.requires_grad
    rates = {side: [m.rate for m in getattr(method, side).modules() if isinstance(m, DropPath)] for side in
             ("student", "teacher")}  # fmt: skip
    assert max(rates["student"]) == 0.3
    assert not any(rates["teacher"])
    sizes = []
    method.teacher.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape)))
    method(batch(method.config, 0), schedule())
    assert sizes == [(2 * IMAGES, 16, 16, 3)]
    assert method.backbone() is method.teacher
    images = batch(method.config, 0).views[0]
    assert torch.equal(method.features(images), method.teacher.forward_features(images).float())


def test_prototypes_are_held_in_the_first_epochs():
    method = built("dino, trained lengths")
    layer = method.student_heads["head"].last_layer
    assert releases(method) == {layer.weight_v: 1.0, layer.weight_g: 1.0}
    assert len(releases(built("dino"))) == 1
    assert not releases(built("dino", freeze_last_layer=0.0))
    dense = built("esvit", region_epoch=3, freeze_last_layer=1)
    views, regions = (set(dense.student_heads[name].parameters()) for name in ("head", "head_dense"))
    until = releases(dense)
    assert {p for p, epoch in until.items() if epoch == 3} == regions
    assert {p for p, epoch in until.items() if epoch == 1} == views & set(
        dense.student_heads["head"].last_layer.parameters()
    )


def test_regions_are_compared_from_an_epoch_on():
    method = built("esvit", region_epoch=2)
    early, metrics = method(batch(method.config, 0), schedule(epoch=1.9))
    early.backward()
    assert "region_loss" not in metrics
    assert all(p.grad is None for p in method.student_heads["head_dense"].parameters())
    _, metrics = method(batch(method.config, 0), schedule(epoch=2.0))
    assert metrics["loss"] == pytest.approx((metrics["view_loss"] + metrics["region_loss"]).item() / 2)


@pytest.mark.parametrize("name", CONFIGS)
def test_chance_is_the_loss_of_equal_features(name):
    method = built(name)
    for heads in (method.student_heads, method.teacher_heads):
        for head in heads.values():
            head.last_layer.weight_v.data[:] = head.last_layer.weight_v.data[:1]
    loss, _ = method(batch(method.config, 0), schedule())
    assert loss.item() == pytest.approx(method.chance_loss(IMAGES), rel=1e-6)


@pytest.mark.parametrize("name", ["dino", "esvit", "esvit of a ViT"])
def test_flops_are_those_that_a_step_runs(name):
    """But attention, which is not in the counter's list, and the loss, which computes no logits twice in our count."""
    method = built(name).float()
    config = method.config
    with FlopCounterMode(display=False) as counter:
        method.encode(method.student, batch(config, 0).views) if name == "dino" else encode_regions(
            method.student, batch(config, 0).views
        )
    regions = name != "dino"
    large, small = (
        config.encoder.flops_at(size, regions=regions) for size in (config.encoder.size, (config.local_size,) * 2)
    )
    expected = IMAGES * (2 * large + config.local_crops * small)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.25)
    head = 2 * sum(p.numel() for p in method.student_heads["head"].parameters() if p.dim() == 2 and p.shape[1] > 1)
    vectors = [
        1 + regions * config.encoder.regions_at(size) for size in (config.encoder.size, (config.local_size,) * 2)
    ]
    large, small = large + vectors[0] * head, small + vectors[1] * head
    assert method.flops(IMAGES) == pytest.approx(IMAGES * (3 * (2 * large + 3 * small) + 2 * large), rel=1e-9)


def test_views():
    views = built("dino").views()
    assert [view.size for view in views] == [(16, 16)] * 2 + [(8, 8)] * 3


def test_residual_networks_are_taken_too():
    """ResNets pool the regions of their last map, as EsViT's released code does."""
    encoder = ResNetConfig(architecture="resnet18", image_size=32, cifar_stem=True)
    method = EsViTConfig(encoder=encoder, local_size=16, **SMALL).build().train()
    loss, _ = method(batch(method.config, 0), schedule())
    assert loss.isfinite()
