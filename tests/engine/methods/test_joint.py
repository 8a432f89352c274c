"""Methods on two views against their textbook form: separate calls, dense logits, batch normalisation of PyTorch."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitrail.engine.methods.base import Schedule
from vitrail.engine.methods.byol import BYOLConfig
from vitrail.engine.methods.joint import spread
from vitrail.engine.methods.moco_v2 import MoCoV2Config
from vitrail.engine.methods.moco_v3 import MoCoV3Config
from vitrail.engine.methods.simclr import SimCLRConfig
from vitrail.engine.methods.simsiam import SimSiamConfig
from vitrail.engine.models.batch_norm import BatchNorm
from vitrail.engine.models.vit import ViTConfig, moco_vit, vit_base, vit_huge, vit_large, vit_small
from vitrail.kernels import multi_tensor_ema_

TINY = moco_vit(ViTConfig(image_size=16, patch_size=4, width=32, depth=2, heads=4))
STEPS = 4
CONFIGS = {
    "moco_v3": MoCoV3Config(encoder=TINY, hidden=24, dim=8),
    "simclr": SimCLRConfig(encoder=TINY, hidden=24, dim=8),
    "byol": BYOLConfig(encoder=TINY, hidden=24, dim=8),
    "simsiam": SimSiamConfig(encoder=TINY, hidden=8, dim=24),
    "moco_v2": MoCoV2Config(encoder=TINY, dim=8, queue=20),
}


def schedule(step: int) -> Schedule:
    return Schedule(step=step, total_steps=STEPS, epoch=step / 2, seed=0, first_row=0, global_rows=6)


def batch(seed: int, images: int = 6):
    generator = torch.Generator().manual_seed(seed)
    return SimpleNamespace(
        views=[torch.randint(0, 256, (images, 16, 16, 3), dtype=torch.uint8, generator=generator) for _ in range(2)]
    )


def built(name: str, **changes):
    torch.manual_seed(1)
    return replace(CONFIGS[name], **changes).build().double().train()


def plain(module: nn.Module) -> nn.Module:
    """The same module with PyTorch's batch normalisation, which knows nothing of groups."""
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, BatchNorm):
                spatial = any(isinstance(other, nn.Conv2d) for other in parent.children())
                kind = nn.BatchNorm2d if spatial else nn.BatchNorm1d
                norm = kind(child.running_mean.numel(), affine=child.weight is not None)
                if child.weight is not None and child.bias is None:
                    norm.bias.requires_grad_(False)
                norm.load_state_dict(child.state_dict(), strict=False)
                setattr(parent, name, norm.double())
    return module


def contrast(q, k, temperature):
    logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / temperature
    return F.cross_entropy(logits, torch.arange(len(q)))


def tokens(encoder, images):
    return encoder(images)[:, 0]


class Textbook:
    """Each method as its authors' code runs it: `loss` of a step, with the teacher's update where it belongs."""

    def __init__(self, name: str, method: nn.Module) -> None:
        self.name, self.config = name, method.config
        self.student = plain(method)

    def update(self, momentum: float) -> None:
        with torch.no_grad():
            for teacher, student in (("momentum_encoder", "encoder"), ("momentum_projector", "projector")):
                mine, other = self.student.get_submodule(teacher), self.student.get_submodule(student)
                for p, q in zip(mine.parameters(), other.parameters(), strict=True):
                    p.mul_(momentum).add_(q, alpha=1 - momentum)

    def momentum(self, step: int) -> float:
        return 1 - (1 - self.config.momentum) * (1 + math.cos(math.pi * step / STEPS)) / 2

    def keys(self, images):
        with torch.no_grad():
            return self.student.momentum_projector(tokens(self.student.momentum_encoder, images))

    def project(self, images):
        return self.student.projector(tokens(self.student.encoder, images))

    def loss(self, views, step: int):
        return getattr(self, self.name)(*views, step)

    def moco_v3(self, first, second, step):
        q1, q2 = (self.student.predictor(self.project(v)) for v in (first, second))
        self.update(self.momentum(step))
        k1, k2 = self.keys(first), self.keys(second)
        t = self.config.temperature
        return 2 * t * (contrast(q1, k2, t) + contrast(q2, k1, t))

    def simclr(self, first, second, step):
        z = F.normalize(self.project(torch.cat([first, second])), dim=1)
        n = len(first)
        logits = (z @ z.T / self.config.temperature).fill_diagonal_(-torch.inf)
        return F.cross_entropy(logits, torch.cat([torch.arange(n) + n, torch.arange(n)]))

    def byol(self, first, second, step):
        p1, p2 = (self.student.predictor(self.project(v)) for v in (first, second))
        k1, k2 = self.keys(first), self.keys(second)

        def distance(p, k):
            return (F.normalize(p, dim=1) - F.normalize(k, dim=1)).square().sum(1).mean()

        return distance(p1, k2) + distance(p2, k1)

    def simsiam(self, first, second, step):
        z1, z2 = self.project(first), self.project(second)
        p1, p2 = self.student.predictor(z1), self.student.predictor(z2)

        def cos(p, z):
            return F.cosine_similarity(p, z.detach()).mean()

        return -0.5 * cos(p1, z2) - 0.5 * cos(p2, z1)

    def moco_v2(self, first, second, step):
        q = F.normalize(self.project(first), dim=1)
        self.update(self.config.momentum)
        k = F.normalize(self.keys(second), dim=1)
        if not hasattr(self, "waiting"):
            self.waiting = list(self.student.queue.clone())
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ torch.stack(self.waiting).T], dim=1)
        self.waiting = (self.waiting + list(k))[-self.config.queue :]
        return F.cross_entropy(logits / self.config.temperature, torch.zeros(len(q), dtype=torch.int64))


def descend(parameters, lr: float = 0.5) -> None:
    with torch.no_grad():
        for p in parameters:
            if p.grad is not None:
                p -= lr * p.grad
                p.grad = None


def follow(method, step: int) -> None:
    """What the trainer does after a step."""
    for pair in method.momentum_pairs():
        teacher, student = list(pair.teacher.parameters()), list(pair.student.parameters())
        momentum = method.ema_momentum(schedule(step), schedule(step + 1))
        with torch.no_grad():
            for p, q in zip(teacher, student, strict=True):
                p.lerp_(q, 1 - momentum)
    method.after_step(True)


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_are_those_of_the_textbook(name):
    method = built(name)
    book = Textbook(name, method)
    for step in range(STEPS - 1):
        views = batch(step).views
        ours, _ = method(SimpleNamespace(views=views), schedule(step))
        theirs = book.loss(views, step)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        ours.backward()
        theirs.backward()
        for key, p in method.named_parameters():
            other = book.student.get_parameter(key)
            torch.testing.assert_close(p.grad, other.grad, rtol=1e-7, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")
        descend(method.parameters())
        descend(book.student.parameters())
        follow(method, step)
        if name == "byol":
            book.update(book.momentum(step))
    if name == "moco_v2":
        # ours is a ring: the oldest key is where the next one goes
        ring = method.queue.roll(-int(method.queue_position), 0)
        torch.testing.assert_close(ring, torch.stack(book.waiting), rtol=1e-6, atol=1e-6)
    for key, buffer in method.named_buffers():
        if "running" in key or "tracked" in key:  # BatchNorm of students and teachers, view after view
            torch.testing.assert_close(buffer, book.student.get_buffer(key), rtol=1e-9, atol=1e-12)


def test_the_teacher_starts_equal_and_needs_no_gradient():
    for name in ("moco_v3", "byol", "moco_v2"):
        method = built(name)
        for pair in method.momentum_pairs():
            for p, q in zip(pair.teacher.parameters(), pair.student.parameters(), strict=True):
                assert torch.equal(p, q)
                assert not p.requires_grad
                assert p is not q


def test_moco_v3_momentum():
    method = built("moco_v3")
    taken = replace(schedule(0), total_steps=300)
    for step, expected in ((40, 0.9904322727), (150, 0.995), (0, 0.99)):
        coming = replace(taken, step=step)
        assert method.ema_momentum(taken, coming) == pytest.approx(expected, abs=1e-10)


def test_queue_keeps_still_when_a_step_is_not_applied():
    method = built("moco_v2")
    before = method.queue.clone()
    method(batch(0), schedule(0))
    method.after_step(False)
    assert torch.equal(method.queue, before)
    method(batch(1), schedule(1))
    method.after_step(True)
    assert int(method.queue_position) == 6
    assert not torch.equal(method.queue[:6], before[:6])
    assert torch.equal(method.queue[6:], before[6:])


def test_queue_smaller_than_a_batch_keeps_the_newest_keys():
    method = built("moco_v2", queue=4)
    keys = F.normalize(torch.randn(6, 8, dtype=torch.float64), dim=1)
    method._keys = {0: keys}
    method.after_step(True)
    assert torch.equal(method.queue, keys[-4:])


def test_published_sizes():
    """Parameters of the released checkpoints' heads."""
    expected = {384: 19_415_040, 768: 20_987_904}
    with torch.device("meta"):
        for encoder in (vit_small(), vit_base()):
            method = MoCoV3Config(encoder=moco_vit(encoder)).build()
            assert sum(p.numel() for p in method.projector.parameters()) == expected[encoder.width]
            assert sum(p.numel() for p in method.predictor.parameters()) == 2_105_344
            assert list(method.projector.state_dict())[:3] == ["0.weight", "1.weight", "1.bias"]
            assert [k for k in method.projector.state_dict() if k.startswith("7")] == [
                "7.running_mean", "7.running_var", "7.num_batches_tracked",
            ]  # fmt: skip
        for encoder, tokens_seen in ((vit_large(), 196), (vit_huge(), 256)):
            assert MoCoV3Config(encoder=moco_vit(encoder)).build().encoder.length == tokens_seen


def test_moco_v3_initialisation():
    torch.manual_seed(0)
    vit = moco_vit(vit_small(), heads=12).build()
    qkv, projection = vit.blocks[0].attn.qkv, vit.patch_embed.proj
    assert vit.blocks[0].attn.heads == 12
    for weight, bound in ((qkv.weight, math.sqrt(6 / 768)), (projection.weight, math.sqrt(6 / (768 + 384)))):
        assert weight.abs().max() <= bound
        assert weight.abs().max() > 0.999 * bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert not qkv.bias.any()
    assert not projection.bias.any()
    assert 0 < vit.cls_token.std() < 2e-6


def test_the_patch_projection_is_frozen_unless_told_otherwise():
    frozen, trained = built("moco_v3"), built("moco_v3", freeze_patch_embed=False)
    assert not any(p.requires_grad for p in frozen.encoder.patch_embed.parameters())
    assert trained.first_layer()[0] is trained.encoder.patch_embed.proj.weight
    assert frozen.first_layer()[0] is frozen.encoder.blocks[0].attn.qkv.weight
    with pytest.raises(ValueError, match=r"no patch projection.*--method.no-freeze-patch-embed"):
        built("moco_v3", encoder=moco_vit(TINY, stem="conv"))


def test_the_convolutional_stem_replaces_a_block():
    encoder = moco_vit(vit_small(), heads=12, stem="conv")
    assert encoder.depth == 11
    method = built("moco_v3", encoder=moco_vit(TINY, stem="conv"), freeze_patch_embed=False)
    book = Textbook("moco_v3", method)
    norms = [m for m in method.encoder.modules() if isinstance(m, BatchNorm)]
    assert norms
    assert all(m.groups == 2 for m in norms)
    views = batch(0).views
    ours, _ = method(SimpleNamespace(views=views), schedule(0))
    torch.testing.assert_close(ours, book.loss(views, 0), rtol=1e-9, atol=1e-9)
    assert method.features(views[0]).shape == (6, 32)


@pytest.mark.parametrize("name", CONFIGS)
def test_chance_is_the_loss_of_equal_embeddings(name):
    method = built(name).float()
    chance = method.chance_loss(6)
    if name in ("byol", "simsiam"):
        assert chance is None
        return
    for head in ("projector", "predictor", "momentum_projector"):
        if hasattr(method, head):
            setattr(method, head, Same())
    method.queue = torch.ones(20, 8) / 8**0.5 if name == "moco_v2" else None
    loss, metrics = method(batch(0), schedule(0))
    assert loss.item() == pytest.approx(chance, rel=1e-5)
    assert metrics["feature_std"] < 1e-3


class Same(nn.Module):
    def forward(self, x):
        return torch.ones(len(x), 8) + 0 * x[:, :1].float()


def test_spread():
    torch.manual_seed(0)
    assert spread(torch.randn(4096, 64)).item() == pytest.approx(1.0, abs=0.01)
    assert spread(torch.ones(16, 64)).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_those_that_a_step_runs(name):
    method = built(name).float()
    with FlopCounterMode(display=False) as counter:
        method(batch(0), schedule(0))
    # The forward pass alone; InfoNCE's own products are not counted, nor attention, which runs in blocks.
    heads = (
        2
        * method.views_per_network
        * 6
        * sum(
            m.in_features * m.out_features
            for h in (*method.trained_heads, *method.taught_heads)
            for m in method.get_submodule(h)
            if isinstance(m, nn.Linear)
        )
    )
    networks = 2 if method.momentum_pairs() else 1
    forward = method.views_per_network * 6 * networks * method.forward_flops + heads
    counted = counter.get_total_flops()
    similarities = {"moco_v3": 2, "simclr": 4, "moco_v2": 1}.get(name, 0) * 2 * 6 * 20 * 8 * 3
    assert counted == pytest.approx(forward, abs=similarities + 1)


def test_multi_tensor_ema_is_what_the_textbook_updates_with():
    """The trainer's update in float32 is the loop of the released code."""
    torch.manual_seed(0)
    teacher, student = torch.randn(100), torch.randn(100)
    expected = teacher * 0.99 + student * (1 - 0.99)
    multi_tensor_ema_([teacher], [student], 0.99)
    torch.testing.assert_close(teacher, expected, rtol=1e-6, atol=1e-7)
