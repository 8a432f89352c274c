"""SiT against golden values of the released code and against its dense form."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from vitrail.engine.methods import sit
from vitrail.engine.methods.base import Schedule
from vitrail.engine.methods.corruption import Corrupted, Corruption
from vitrail.engine.methods.sit import SiTConfig, as_images, corrupted_l1
from vitrail.engine.models.block import DropPath
from vitrail.engine.models.vit import ViTConfig, dino_vit, vit_base, vit_small, vit_tiny
from vitrail.engine.train.config import ConfigError
from vitrail.engine.train.grad_cache import check_comparisons
from vitrail.engine.train.param_groups import parameter_groups
from vitrail.recipes import sit_small_data, sit_vits16

IMAGES, STEPS = 4, 4
VIT = dino_vit(ViTConfig(image_size=32, patch_size=8, width=32, depth=2, heads=4))
SMALL = SiTConfig(encoder=VIT, hidden=24, dim=16, recon_weight=2.5)


def schedule(step: int = 0) -> Schedule:
    return Schedule(step=step, total_steps=STEPS, epoch=step / 2, seed=0, first_row=0, global_rows=IMAGES)


def batch(seed: int = 0, images: int = IMAGES, side: int = 32):
    generator = torch.Generator().manual_seed(seed)
    return SimpleNamespace(
        views=[torch.randint(0, 256, (images, side, side, 3), dtype=torch.uint8, generator=generator) for _ in range(2)]
    )


def built(config=SMALL, **changes):
    torch.manual_seed(1)
    return replace(config, **changes).build().double().train()


def test_golden():
    """Two views of four images, a rectangle of each hidden, through networks filled with sines."""
    method = built(replace(SMALL, hidden=64, dim=16, mean=(0.0,) * 3, std=(1.0,) * 3))
    weights = {k: v for k, v in method.student.state_dict().items() if v.is_floating_point() and "running" not in k}
    for i, (name, tensor) in enumerate(sorted(weights.items())):
        j = torch.arange(1, tensor.numel() + 1, dtype=torch.float64)
        scale = tensor.dim() == 1 and name.endswith(".weight")
        tensor.copy_((0.05 * torch.sin(0.37 * j + 1.1 * i) + scale).view(tensor.shape))
    with torch.no_grad():
        for name, parameter in method.teacher.named_parameters():
            parameter.copy_(0.9 * method.student.get_parameter(name))
    n, c, y, x = (torch.arange(count, dtype=torch.float64) for count in (4, 3, 32, 32))
    first = torch.sin(0.3 * n[:, None, None, None] + 0.7 * c[:, None, None] + 0.11 * y[:, None] + 0.13 * x)
    first = first + 0.1 * torch.cos(0.05 * x * y[:, None])
    views = torch.cat([first, first.flip(-1) + 0.05 * first**2]).permute(0, 2, 3, 1).contiguous()
    mask = torch.zeros(8, 32, 32, dtype=torch.bool)
    mask[:4, 4:20, 8:24] = mask[4:, :16, 10:30] = True
    corrupted = Corrupted(views.masked_fill(mask[..., None], 0), mask)
    loss, metrics = method.losses(views, corrupted)
    assert metrics["contrastive"].item() == pytest.approx(2.4490890588543475, rel=1e-11)  # batch norm of like rows
    assert metrics["reconstruction"].item() == pytest.approx(0.6626435324340968, rel=1e-14)
    assert loss.item() == pytest.approx(2.4490890588543475 + 2.5 * 0.6626435324340968, rel=1e-11)
    tokens = method.student.backbone(corrupted.images)
    assert method.student.head_recons(tokens[:, 1:]).sum().item() == pytest.approx(806.3425041171868, rel=1e-13)
    classes = method.student.head(tokens[:, 0])[0, :3]
    assert classes.tolist() == pytest.approx([0.770839084, 1.621458906, 0.069813949], abs=5e-10)


@pytest.mark.parametrize(
    ("vit", "counts"),
    [
        (vit_tiny(), (5_524_416, 18_637_056, 258_627)),
        (vit_small(), (21_665_664, 19_423_488, 738_435)),
        (vit_base(), (85_798_656, 20_996_352, 2_361_603)),
    ],
)
def test_published_sizes_and_keys(vit, counts):
    with torch.device("meta"):
        student = SiTConfig(encoder=dino_vit(vit)).build().student
    parts = (student.backbone, student.head, student.head_recons)
    assert tuple(sum(p.numel() for p in part.parameters()) for part in parts) == counts
    keys = {k: tuple(v.shape) for k, v in student.state_dict().items()}
    assert len(keys) == 177
    width = vit.width
    expected = {
        "backbone.pos_embed": (1, 197, width),
        "head.mlp.0.weight": (4096, width),
        "head.mlp.3.weight": (4096, 4096),
        "head.mlp.4.running_var": (4096,),
        "head.mlp.6.bias": (256,),
        "head.mlp.7.running_mean": (256,),
        "head_recons.mlp.4.weight": (width, width),
        "head_recons.convTrans.weight": (width, 3, 16, 16),
        "head_recons.convTrans.bias": (3,),
    }
    assert expected.items() <= keys.items()
    assert "head.mlp.7.weight" not in keys


def test_initialisation():
    student = SiTConfig(encoder=VIT, hidden=256).build().student
    for weight in (student.backbone.pos_embed, student.head.mlp[3].weight, student.head_recons.mlp[2].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not any(student.head.mlp[i].bias.any() for i in (0, 3, 6))
    bound = 1 / (3 * 64) ** 0.5  # PyTorch's of a transposed convolution
    assert 0.98 * bound < student.head_recons.convTrans.weight.abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_painted_pixels_are_judged_as_by_the_dense_form(monkeypatch, dtype):
    """Value and gradient of the mean over chosen pixels of all images, as many as do not fit one part."""
    monkeypatch.setattr(sit, "PAINTED_AT_ONCE", 16 * 64 * 96)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (21, 64, 96, 3), dtype=torch.uint8)
    mask = torch.rand(21, 64, 96) < torch.rand(21, 1, 1)
    pred = torch.randn(21, 96, 192, dtype=torch.float64).to(dtype).requires_grad_()
    compute = torch.promote_types(dtype, torch.float32)
    mean, std = (torch.tensor(v, dtype=compute) for v in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)))

    def normalise(pixels):
        return pixels / (255 * std) - mean / std

    other = pred.detach().clone().requires_grad_()
    ours = corrupted_l1(pred, images, mask, normalise)
    chosen = mask[..., None].expand(images.shape)
    tiles = other.unflatten(2, (8, 8, 3)).unflatten(1, (8, 12)).transpose(2, 3).reshape(images.shape)
    target = (images.to(compute) / 255 - mean) / std
    theirs = (tiles[chosen] - target[chosen]).abs().mean()
    assert ours.dtype == theirs.dtype == compute
    (3 * ours).backward()
    (3 * theirs).backward()
    exact = dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=1e-12 if exact else 1e-6, atol=0)
    assert pred.grad.dtype == dtype
    torch.testing.assert_close(pred.grad, other.grad, rtol=1e-12 if exact else 1e-2, atol=0)
    torch.testing.assert_close(as_images(other, images), tiles, rtol=0, atol=0)


class Dense:
    """The losses of the released code: images channels first, logits of all pairs, pixels chosen by their mask."""

    def __init__(self, method) -> None:
        self.method, self.config = copy.deepcopy(method), method.config

    def heads(self, network, tokens):
        """Batch normalisation by the statistics of both views together."""
        x = tokens[:, 0]
        for i, between in ((0, F.relu), (3, F.gelu), (6, lambda x: x)):
            x = network.head.mlp[i](x)
            norm = network.head.mlp[i + 1]
            var, mean = torch.var_mean(x, dim=0, correction=0)
            x = (x - mean) / (var + 1e-5).sqrt()
            x = between(x if norm.weight is None else x * norm.weight + norm.bias)
        return x

    def loss(self, clean, corrupted, mask):
        """Of normalised views and a mask `[2 n, 3, H, W]`."""
        student, teacher = self.method.student, self.method.teacher
        with torch.no_grad():
            keys = self.heads(teacher, student_like(teacher.backbone, clean)).chunk(2)
        tokens = student_like(student.backbone, corrupted)
        queries = self.heads(student, tokens).chunk(2)
        contrastive = 0.0
        for query, key in zip(queries, reversed(keys), strict=True):
            logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / 0.2
            contrastive = contrastive + 2 * 0.2 * F.cross_entropy(logits, torch.arange(len(query)))
        x = tokens[:, 1:]
        for i in (0, 2, 4):
            x = F.gelu(student.head_recons.mlp[i](x))
        paint = student.head_recons.convTrans
        x = x.transpose(1, 2).unflatten(2, self.config.encoder.grid)
        painted = F.conv_transpose2d(x, paint.weight, paint.bias, stride=self.config.encoder.patch_size)
        reconstruction = (painted - clean).abs()[mask == 1].mean()
        return contrastive + self.config.recon_weight * reconstruction, contrastive, reconstruction


def student_like(backbone, images):
    """A backbone's tokens of normalised images."""
    patches = backbone.patch_embed.proj
    x = F.conv2d(images, patches.weight, patches.bias, stride=patches.stride).flatten(2).transpose(1, 2)
    x = torch.cat([backbone.cls_token.expand(len(x), -1, -1), x], dim=1) + backbone.pos_embed
    for block in backbone.blocks:
        x = block(x)
    return backbone.norm(x)


@pytest.mark.parametrize("selected", [True, False])
@pytest.mark.parametrize("corruption", [Corruption(), Corruption(align=8, replaced=0.2)])
def test_steps_are_those_of_the_dense_form(monkeypatch, corruption, selected):
    """Losses and all gradients over three steps in which student and teacher part, as on a CPU and as on a GPU."""
    method = built(corruption=corruption)
    assert method.paints_selected(torch.device("cpu")) > method.paints_selected(torch.device("cuda"))
    monkeypatch.setattr(type(method), "paints_selected", lambda method, device: selected)
    painted: list[int] = []
    method.student.head_recons.register_forward_pre_hook(lambda _, args: painted.append(args[0].shape[:-1].numel()))
    dense = Dense(method)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (SMALL.mean, SMALL.std))
    for step in range(3):
        views = batch(step).views
        noise = schedule(step).uniform(IMAGES, 2 * corruption.columns, torch.device("cpu"))
        seen = method.corrupt(torch.cat(views), torch.cat(noise.chunk(2, dim=1)), batch=IMAGES)
        ours, metrics = method(SimpleNamespace(views=views), schedule(step))
        clean = (torch.cat(views).permute(0, 3, 1, 2).double() / 255 - mean) / std
        mask = seen.mask[:, None].expand(clean.shape).double()
        theirs = dense.loss(clean, seen.images.permute(0, 3, 1, 2), mask)
        for value, expected in zip((ours, metrics["contrastive"], metrics["reconstruction"]), theirs, strict=True):
            assert value.item() == pytest.approx(expected.item(), rel=1e-8)
        assert metrics["loss"] == ours.detach()
        assert metrics["corrupted"].item() == pytest.approx(mask.mean().item(), rel=1e-6)
        assert metrics["feature_std"] > 0
        touched = seen.mask.unflatten(2, (-1, 8)).unflatten(1, (-1, 8)).any(4).any(2)
        assert painted[step] == (touched.sum() if selected else touched.numel())
        ours.backward()
        theirs[0].backward()
        for key, p in method.named_parameters():
            other = dense.method.get_parameter(key)
            assert (p.grad is None) == (other.grad is None) == key.startswith("teacher"), key
            if p.grad is not None:
                torch.testing.assert_close(p.grad, other.grad, rtol=1e-5, atol=1e-8, msg=lambda m, k=key: f"{k}: {m}")
        with torch.no_grad():
            for one in (method, dense.method):
                for key, p in one.student.named_parameters():
                    p -= 0.05 * p.grad
                    p.grad = None
                    one.teacher.get_parameter(key).lerp_(p, 0.3)


@pytest.mark.parametrize("pixels", ["dataset", "image"])
def test_what_is_not_corrupted_looks_the_same_to_both(pixels):
    """Student and teacher read pixels in different ways."""
    short = {"mean": (0.5, 0.25, 0.375), "std": (0.25, 0.125, 0.5)}  # the same in float32
    method = built(encoder=replace(VIT, pixels=pixels), **short)
    images = batch().views[0] // 3
    noise = torch.rand(IMAGES, SMALL.corruption.columns)
    seen = method.corrupt(images, noise, batch=IMAGES)
    clean = method.normalise(method.targets(images))
    same = ~seen.mask | (seen.images == clean).all(-1)
    assert 0.3 < same.double().mean() < 0.9
    torch.testing.assert_close(seen.images[same], clean[same], rtol=0, atol=0)
    torch.testing.assert_close(method.student.backbone(clean), method.teacher.backbone(images), rtol=1e-9, atol=1e-9)


def test_hidden_patches_are_nothing_but_the_bias():
    method = built(corruption=Corruption(align=8, replaced=0.0))
    seen = method.corrupt(torch.cat(batch().views), torch.rand(8, method.config.corruption.columns), batch=IMAGES)
    embed = method.student.backbone.patch_embed
    hidden = seen.mask[:, ::8, ::8].flatten(1)
    assert hidden.any(1).all()
    assert (embed(seen.images)[hidden] == embed.proj.bias).all()


def test_the_teacher():
    """Equal to the student at the start, without gradient and stochastic depth; sees clean views, paints nothing."""
    method = built(encoder=replace(VIT, drop_path=0.3))
    (pair,) = method.momentum_pairs()
    assert (pair.teacher, pair.student, pair.student_only) == (method.teacher, method.student, ())
    for name, p in method.teacher.named_parameters():
        assert torch.equal(p, method.student.get_parameter(name)), name
        assert not p.requires_grad
    rates = [[m.rate for m in side.modules() if isinstance(m, DropPath)] for side in (method.student, method.teacher)]
    assert max(rates[0]) == 0.3
    assert not any(rates[1])
    seen = []
    method.teacher.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    method.teacher.head_recons.register_forward_pre_hook(lambda *_: pytest.fail("the teacher paints"))
    views = batch().views
    method(SimpleNamespace(views=views), schedule())
    assert torch.equal(seen[0], torch.cat(views))
    assert method.backbone() is method.teacher.backbone
    assert torch.equal(method.features(views[0]), method.teacher.backbone(views[0])[:, 0].float())
    for step, momentum in ((0, 0.996), (STEPS // 2, 0.998), (STEPS, 1.0)):
        assert method.ema_momentum(schedule(step), schedule(step + 1)) == pytest.approx(momentum, abs=1e-12)
    before = method.teacher.head.mlp[1].running_mean.clone()
    method(SimpleNamespace(views=views), schedule())
    assert not torch.equal(method.teacher.head.mlp[1].running_mean, before)  # never in eval mode while it trains


def test_uint8_alone_travels_to_the_device():
    """Clean views: corruption and mask are drawn where they are needed. The released loader sends 3.6 MB."""
    method = replace(sit_vits16.recipe().method, encoder=replace(vit_small(), depth=1), hidden=8).build()
    sizes = [view.size for view in method.views()]
    assert sum(3 * height * width for height, width in sizes) == 301_056
    given = batch(images=2, side=224)
    assert sum(view.nbytes for view in given.views) == 2 * 301_056
    loss, _ = method(given, schedule())
    assert loss.isfinite()


def test_what_is_decayed_and_what_is_clipped():
    recipe = sit_vits16.recipe()
    with torch.device("meta"):
        method = recipe.method.build()
    plain, decayed = parameter_groups(method, recipe)
    names = {id(p): name for name, p in method.student.named_parameters()}
    assert {"backbone.pos_embed", "backbone.cls_token"} <= {names[id(p)] for p in decayed["params"]}
    assert all(p.dim() == 1 for p in plain["params"])
    assert len(plain["params"]) + len(decayed["params"]) == len(names)
    assert (recipe.peak_lr, recipe.optim.clip, recipe.optim.clip_per_tensor) == (5e-4, 3.0, True)
    assert method.first_layer()[0] is method.student.backbone.patch_embed.proj.weight


def test_accumulation_is_asked_for_or_refused():
    """Negatives and batch statistics would be those of a part of the batch."""
    small, large = sit_small_data.recipe(), sit_vits16.recipe()
    with torch.device("meta"):
        methods = [one.method.build() for one in (small, large)]
    assert check_comparisons(methods[0], small, 1) is None
    assert check_comparisons(methods[1], large, 4) is None
    with pytest.raises(ConfigError, match=r"SiT sees 64 images at a time, not 256.*; pass --train.micro-batch 256"):
        check_comparisons(methods[1], large, 1)
    accepted = replace(large, train=replace(large.train, accumulation=4))
    assert "SiT sees 64 images" in check_comparisons(methods[1], accepted, 1)
    assert large.method.recon_weight == 1
    assert small.method.recon_weight == 5


@pytest.mark.parametrize("pixels", ["dataset", "image"])
def test_pictures(pixels):
    """What is shown of an image: itself, corrupted, and with the corrupted pixels painted."""
    method = built(encoder=replace(VIT, pixels=pixels), corruption=Corruption(replaced=0.0)).eval()
    images = batch().views[0]
    noise = torch.rand(IMAGES, method.config.corruption.columns)
    shown = method.reconstruct(images, noise)
    mask = method.corrupt(images, noise, batch=IMAGES).mask
    assert all(part.dtype == torch.uint8 and part.shape == images.shape for part in shown)
    assert torch.equal(shown.image, images) == (pixels == "dataset")
    for part in (shown.masked, shown.painted):
        assert torch.equal(part[~mask], shown.image[~mask])
    grey = (255 * torch.tensor(SMALL.mean)).round().to(torch.uint8)
    assert (shown.masked[mask] == grey).all()
    tokens = method.student.backbone(method.corrupt(images, noise, batch=IMAGES).images)
    painted = as_images(method.student.head_recons(tokens[:, 1:]), images)
    colours = (255 * (painted * torch.tensor(SMALL.std) + torch.tensor(SMALL.mean)).clamp(0, 1)).round()
    assert (shown.painted.double() - colours)[mask].abs().max() <= 1


def test_flops_are_those_that_a_step_runs():
    """But attention, which the counter does not see here."""
    method = built().float()
    images = torch.cat(batch().views)
    seen = method.corrupt(images, torch.rand(len(images), SMALL.corruption.columns), batch=IMAGES)
    with FlopCounterMode(display=False) as counter:
        method.losses(images, seen)[0].backward()
    assert method.flops(IMAGES) == pytest.approx(counter.get_total_flops(), rel=0.25)
    encoder, heads = VIT, 2 * (32 * 24 + 24 * 24 + 24 * 16)
    painting = 2 * 16 * (3 * 32 * 32 + 32 * 192)
    expected = 3 * (encoder.region_flops + heads + painting) + encoder.flops + heads
    assert method.flops(IMAGES) == pytest.approx(IMAGES * 2 * expected)
