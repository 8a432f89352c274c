"""SiT pre-training of ViT-S/16 on ImageNet-1k (Atito, Awais, Kittler, arXiv 2104.03602).

    deepspeed recipes/sit_vits16.py --data.path /imagenet/train --data.val-path /imagenet/val
    deepspeed recipes/sit_vits16.py --demo

The settings are those of the released code. Its authors give no accuracy on ImageNet itself: SiT is meant as
pre-training for other, smaller sets.
"""

from dataclasses import replace
from pathlib import Path

try:
    from vitrail.engine.methods.corruption import Corruption
    from vitrail.engine.methods.sit import SiTConfig
    from vitrail.engine.models.vit import dino_vit, vit_small
    from vitrail.engine.train import EvaluateConfig, OptimConfig, RunConfig, TrainConfig, launch
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: install vitrail first, with `pip install -e .` in its folder") from None


def recipe() -> RunConfig:
    """The released code's run of 800 epochs on four GPUs."""
    return RunConfig(
        method=SiTConfig(
            encoder=replace(dino_vit(vit_small(patch_size=16)), drop_path=0.1),  # the student's
            corruption=Corruption(
                drop=0.5,  # half of a view becomes the mean colour ...
                replace=0.3,  # ... or 30 % pieces of another image, each in half of the views
                align=1,  # code's default: rectangles begin anywhere; 16 keeps to the patches
            ),
            temperature=0.2,
            recon_weight=1,  # large data sets
            momentum=0.996,  # to 1 along half a cosine
            crop_scale=(0.2, 1.0),
        ),
        optim=OptimConfig(
            base_lr=5e-4,  # x 256 / 256 = 5e-4
            min_lr=1e-6,
            schedule="dino",
            warmup_epochs=10,
            betas=(0.9, 0.999),
            weight_decay=0.04,
            final_weight_decay=0.1,  # along half a cosine
            clip=3.0,
            clip_per_tensor=True,
        ),
        train=TrainConfig(
            epochs=800,
            batch_size=256,
            micro_batch=64,  # on 4 GPUs, so that all 256 images are compared
            zero_stage=0,  # one pass steps student and teacher
            output=Path("runs/sit_vits16"),
        ),
        evaluate=EvaluateConfig(knn_every=20),
    )


if __name__ == "__main__":
    launch(recipe)
