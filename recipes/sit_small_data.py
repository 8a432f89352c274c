"""SiT pre-training of ViT-S/16 on some thousands of images, such as Flowers or Pets (arXiv 2104.03602).

    deepspeed recipes/sit_small_data.py --data.path /flowers/train --data.val-path /flowers/val
    deepspeed recipes/sit_small_data.py --demo

No other images are seen. Pre-training so, and then fine-tuning on the same images, is published to be 20 to 60 points
better than training with labels alone.
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
    """The paper's 3,000 epochs, with the released code's settings and its weight for small data sets."""
    return RunConfig(
        method=SiTConfig(
            encoder=replace(dino_vit(vit_small(patch_size=16)), drop_path=0.1),
            corruption=Corruption(drop=0.5, replace=0.3, align=1),
            temperature=0.2,
            recon_weight=5,  # few images: painting teaches more than telling them apart
            momentum=0.996,
            crop_scale=(0.2, 1.0),
        ),
        optim=OptimConfig(
            base_lr=5e-4,  # x 64 / 256 = 1.25e-4
            min_lr=1e-6,
            schedule="dino",
            warmup_epochs=10,
            betas=(0.9, 0.999),
            weight_decay=0.04,
            final_weight_decay=0.1,
            clip=3.0,
            clip_per_tensor=True,
        ),
        train=TrainConfig(
            epochs=3000,
            batch_size=64,  # one GPU; the released code's batch per GPU
            micro_batch=64,
            zero_stage=0,
            save_every=100,
            output=Path("runs/sit_small_data"),
        ),
        evaluate=EvaluateConfig(knn_every=100),
    )


if __name__ == "__main__":
    launch(recipe)
