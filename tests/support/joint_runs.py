"""Tiny runs of the methods on two views, in processes of their own; a script as `training.py` is."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import training
from safetensors.torch import save_file

from vitrail.engine.methods.base import Schedule
from vitrail.engine.methods.byol import BYOLConfig
from vitrail.engine.methods.corruption import Corruption
from vitrail.engine.methods.dino import DINOConfig
from vitrail.engine.methods.esvit import EsViTConfig
from vitrail.engine.methods.ibot import IBOTConfig
from vitrail.engine.methods.moco_v2 import MoCoV2Config
from vitrail.engine.methods.moco_v3 import MoCoV3Config
from vitrail.engine.methods.simclr import SimCLRConfig
from vitrail.engine.methods.simmim import SimMIMConfig
from vitrail.engine.methods.simsiam import SimSiamConfig
from vitrail.engine.methods.sit import SiTConfig
from vitrail.engine.models.swin import SwinConfig
from vitrail.engine.models.vit import ViTConfig, beit_vit, dino_vit, moco_vit

STEPS, BATCH, POISON = 4, 16, 1
ENCODER = moco_vit(ViTConfig(image_size=32, patch_size=8, width=32, depth=2, heads=4))
CROPS: dict[str, Any] = {
    "prototypes": 32,
    "hidden": 32,
    "bottleneck": 16,
    "local_crops": 2,
    "local_size": 16,
    "freeze_last_layer": 0.0,
    "momentum": 0.9,
}
METHODS = {
    "moco_v3": MoCoV3Config(encoder=ENCODER, hidden=32, dim=16),
    "simclr": SimCLRConfig(encoder=ENCODER, hidden=32, dim=16),
    "byol": BYOLConfig(encoder=ENCODER, hidden=32, dim=16),
    "simsiam": SimSiamConfig(encoder=ENCODER, hidden=16, dim=32),
    "moco_v2": MoCoV2Config(encoder=ENCODER, dim=16, queue=32),
    "dino": DINOConfig(encoder=replace(dino_vit(ENCODER), drop_path=0.0), **CROPS, norm_last_layer=False),
    "esvit": EsViTConfig(encoder=SwinConfig(image_size=32, width=16, depths=(2, 2), heads=(2, 2), window=3), **CROPS),
    "esvit_sinkhorn": EsViTConfig(
        encoder=SwinConfig(image_size=32, width=16, depths=(2, 2), heads=(2, 2), window=3),
        **CROPS,
        centering="sinkhorn",
    ),
    "ibot": IBOTConfig(
        encoder=replace(dino_vit(ENCODER), drop_path=0.0, mask_token=True), patch_prototypes=24, **CROPS
    ),
    # Pieces come from the images of a rank: with them two ranks would see other pixels than one.
    "sit": SiTConfig(
        encoder=dino_vit(ENCODER), hidden=32, dim=16, momentum=0.9, corruption=Corruption(replaced=0.0, align=2)
    ),
    "simmim": SimMIMConfig(encoder=beit_vit(ENCODER), mask_size=8),
    "simmim_swin": SimMIMConfig(
        encoder=SwinConfig(image_size=32, width=16, depths=(2, 2), heads=(2, 2), window=3, mask_token=True), mask_size=8
    ),
}
CACHED = ("moco_v3", "simclr", "byol", "moco_v2")
STATEFUL = ("moco_v3", "moco_v2", "esvit", "ibot", "sit")
INTERRUPTED = (*STATEFUL, "simmim")
STAGES: dict[str, dict[str, Any]] = {
    "ibot 0": {"zero_stage": 0, "micro": 4},
    "ibot 2": {"zero_stage": 2, "checkpoint_activations": True},
    "ibot 3": {"zero_stage": 3},
    "sit 0": {"zero_stage": 0},
    "sit 2": {"zero_stage": 2, "checkpoint_activations": True},
    "sit 3": {"zero_stage": 3},
    "simmim 0": {"zero_stage": 0, "micro": 4},
    "simmim 2": {"zero_stage": 2, "checkpoint_activations": True},
    "simmim 3": {"zero_stage": 3},
    "simmim_swin 3": {"zero_stage": 3, "checkpoint_activations": True},
}


def config(output: Path, method: Any, *, micro: int, **train: Any) -> Any:
    """A few steps in fp32 on the demo images."""
    base = training.tiny_config(
        output,
        **{"precision": "fp32", "batch_size": BATCH, "micro_batch": micro, **train},
        epochs=STEPS / (training.IMAGES // BATCH),
    )
    return replace(
        base,
        method=method,
        data=replace(base.data, decoder="pillow"),
        # A step in proportion to the gradient: Adam would blow up the rounding of gradients that are zero by symmetry.
        optim=replace(base.optim, name="sgd", lr=1e-3, decay="all"),
    )


def train(run: Any, **hooks: Any) -> dict[str, Any]:
    """Run a configuration; keep its last weights as `<name>.safetensors` beside its output folder."""
    from vitrail.engine.train.checkpoint import whole_state

    result = training.train(run, **hooks)
    whole = whole_state(result.method, sharded=run.train.zero_stage == 3)
    output = run.train.output
    if torch.distributed.get_rank() != 0:
        return {}
    save_file({k: v.contiguous() for k, v in whole.items()}, output.with_name(output.name + ".safetensors"))
    return {name: training.logged(output, name) for name in ("loss", "gradient_norm")}


def runs(scratch: Path) -> Any:
    """All methods in one pass, the first two cached in every stage; one rank or several."""
    world = int(training.os.environ.get("WORLD_SIZE", "1"))
    micro, report = BATCH // world, {}
    for name, method in METHODS.items():
        report[name] = train(config(scratch / name, method, micro=micro))
    for name in CACHED:
        output = scratch / f"{name} cached"
        report[output.name] = train(config(output, METHODS[name], micro=4, grad_cache=True))
    for name in ("dino", "esvit"):
        report[f"{name} accumulated"] = train(config(scratch / f"{name} accumulated", METHODS[name], micro=4))
        for stage in (0, 3):
            output = scratch / f"{name} {stage}"
            report[output.name] = train(config(output, METHODS[name], micro=micro, zero_stage=stage))
    for name, how in STAGES.items():
        report[name] = train(config(scratch / name, METHODS[name.split()[0]], **{"micro": micro, **how}))
    for stage in (0, 2, 3):
        output = scratch / f"moco_v3 cached {stage}"
        report[output.name] = train(config(output, METHODS["moco_v3"], micro=4, grad_cache=True, zero_stage=stage))
    output = scratch / "moco_v2 cached 3"
    report[output.name] = train(config(output, METHODS["moco_v2"], micro=4, grad_cache=True, zero_stage=3))
    output = scratch / "moco_v3 accumulated"
    report[output.name] = train(config(output, METHODS["moco_v3"], micro=4, accumulation=4 // world))
    output = scratch / "moco_v3 bf16"
    report[output.name] = train(config(output, METHODS["moco_v3"], micro=micro, precision="bf16"))
    output = scratch / "moco_v3 bf16 cached"
    report[output.name] = train(config(output, METHODS["moco_v3"], micro=4, precision="bf16", grad_cache=True))
    report["shuffled"] = shuffled()
    if world == 1:
        report |= {"dropped": dropped(scratch / "dropped"), "events": training.events(scratch / "moco_v3 accumulated")}
        for name in STATEFUL:
            report[f"{name} poisoned"] = poisoned(scratch / f"{name} poisoned", name)
        for name in INTERRUPTED:
            run = config(scratch / f"{name} parts", METHODS[name], micro=BATCH)
            training.train(run, stop_after=2)
            report[f"{name} parts"] = train(run)
    return report


def shuffled() -> dict[str, Any]:
    """The teacher's features of a batch whose statistics are each rank's own."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(0)
    encoder = moco_vit(ViTConfig(image_size=16, patch_size=4, width=16, depth=2, heads=2), stem="conv")
    method = MoCoV2Config(encoder=encoder, dim=8, queue=16).build()
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8, generator=generator)
    mine = images[rank * 8 // world : (rank + 1) * 8 // world]
    schedule = Schedule(step=3, total_steps=9, epoch=0.0, seed=5, first_row=0, global_rows=8)
    with torch.no_grad():
        features = method.teacher_features(SimpleNamespace(views=[mine, mine]), schedule)[0]
        order = torch.randperm(8, generator=torch.Generator().manual_seed((5 << 32) + 3))
        parts = [method.momentum_encoder.forward_features(images[part]) for part in order.chunk(2)]
    expected = torch.empty_like(torch.cat(parts))
    expected[order] = torch.cat(parts)
    return {"features": features.tolist(), "halves": expected[: len(features)].tolist()}


def dropped(output: Path) -> list[list[float]]:
    """Sums of the features that each pass of the backbone gives under stochastic depth: cached, and then again."""
    sums: list[float] = []
    method = replace(METHODS["moco_v3"], encoder=replace(ENCODER, drop_path=0.5))

    def before(trainer: Any) -> None:
        plain = trainer.method.student_features

        def watched(batch: Any) -> torch.Tensor:
            features = plain(batch)
            sums.append(features.detach().double().sum().item())
            return features

        trainer.method.student_features = watched

    train(config(output, method, micro=4, grad_cache=True), before=before)
    return [sums[8 * step : 8 * step + 8] for step in range(STEPS)]


def poisoned(output: Path, name: str) -> dict[str, list[bool]]:
    """Which kinds of state outside the optimiser moved with each step, the second of which has no finite gradient."""
    moved: dict[str, list[bool]] = {}
    last: dict[str, torch.Tensor] = {}

    def buffers(trainer: Any) -> dict[str, torch.Tensor]:
        kinds = ("running", "tracked", "queue", "centers")
        return {k: v.clone() for k, v in trainer.method.named_buffers() if any(kind in k for kind in kinds)}

    def before(trainer: Any) -> None:
        last.update(buffers(trainer))
        where = "criterion" if hasattr(trainer.method, "criterion") else "forward"
        plain = getattr(trainer.method, where)

        def poison(given: Any, schedule: Any) -> Any:
            loss, metrics = plain(given, schedule)
            return loss * (torch.nan if schedule.step == POISON else 1.0), metrics

        setattr(trainer.method, where, poison)

    def after(trainer: Any) -> None:
        for key, value in buffers(trainer).items():
            moved.setdefault(key, []).append(not torch.equal(value, last[key]))
            last[key] = value

    train(config(output, METHODS[name], micro=BATCH), before=before, after=after)
    return moved


if __name__ == "__main__":
    training.run_in_process({"runs": runs})
