"""Tiny runs of DINOv2 in processes of their own; a script as `training.py` is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import joint_runs
import training

from vitrail.engine.methods.dinov2 import DINOv2Config
from vitrail.engine.models.vit import ViTConfig, dinov2_vit

ENCODER = replace(dinov2_vit(ViTConfig(image_size=32, patch_size=8, width=32, depth=2, heads=4)), layer_scale=0.5)
# KoLeo's neighbours are those of one rank: without it, any number of ranks computes the same.
CENTRED = DINOv2Config(encoder=ENCODER, **joint_runs.CROPS, koleo_weight=0.0, layer_decay=0.7)
BALANCED = replace(CENTRED, centering="sinkhorn", patch_prototypes=24, patch_bottleneck=8)
METHODS = {"centred": CENTRED, "balanced": BALANCED}
CLIP = 0.3  # below the norms of backbone and heads at most steps


def config(output: Path, method: DINOv2Config, **train: Any) -> Any:
    """A few steps, each part clipped by its own norm."""
    base = joint_runs.config(output, method, **train)
    return replace(base, optim=replace(base.optim, clip=CLIP, clip_per_part=True, lr=0.1, decay="matrices"))


def runs(scratch: Path) -> Any:
    """Both ways of balancing, and one of them in every stage; on one rank also recomputed, interrupted and cut up."""
    world = int(training.os.environ.get("WORLD_SIZE", "1"))
    micro = joint_runs.BATCH // world
    planned: dict[str, tuple[DINOv2Config, dict[str, Any]]] = {name: (m, {}) for name, m in METHODS.items()}
    stages = (0, 3) if world == 1 else (0, 2, 3)
    planned |= {f"balanced {stage}": (BALANCED, {"zero_stage": stage}) for stage in stages}
    if world == 1:
        planned["balanced recomputed"] = BALANCED, {"checkpoint_activations": True}
        planned["centred accumulated"] = CENTRED, {"micro": 4}
        planned["koleo"] = replace(CENTRED, koleo_weight=0.1), {}
    report = {}
    for name, (method, train) in planned.items():
        report[name] = joint_runs.train(config(scratch / name, method, **{"micro": micro, **train}))
    if world == 1:
        run = config(scratch / "koleo parts", replace(CENTRED, koleo_weight=0.1), micro=micro)
        training.train(run, stop_after=2)
        report["koleo parts"] = joint_runs.train(run)
    return report


if __name__ == "__main__":
    training.run_in_process({"runs": runs})
