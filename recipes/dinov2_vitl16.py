"""DINOv2 pre-training of ViT-L/16 on ImageNet-1k (Oquab et al., arXiv 2304.07193): the released code's short setting.

    deepspeed recipes/dinov2_vitl16.py --data.path /imagenet/train --data.val-path /imagenet/val
    deepspeed recipes/dinov2_vitl16.py --demo

Published result of the released code with these settings: 81.6 % by nearest neighbours and 82.9 % with a linear
classifier. Its 100 epochs have 1,250 steps each, whatever the data: of 2,048 images, 200 passes over ImageNet-1k.
"""

from dataclasses import replace
from pathlib import Path

try:
    from vitrail.engine.methods.dinov2 import DINOv2Config
    from vitrail.engine.models.vit import dinov2_vit, vit_large
    from vitrail.engine.train import EvaluateConfig, OptimConfig, RunConfig, TrainConfig, launch
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: install vitrail first, with `pip install -e .` in its folder") from None

EPOCH = 1250 / (1_281_167 // 2048)  # passes over the images in one of the released code's epochs: 2


def recipe() -> RunConfig:
    """The released code's default settings."""
    return RunConfig(
        method=DINOv2Config(
            encoder=replace(dinov2_vit(vit_large(patch_size=16)), drop_path=0.3),  # the same in all blocks
            prototypes=65_536,  # of views and patches, which share a head
            centering="centering",
            freeze_last_layer=1 * EPOCH,
            warmup_teacher_temp=0.04,
            teacher_temp=0.07,
            warmup_teacher_temp_epochs=30 * EPOCH,
            momentum=0.992,  # to 1 along half a cosine
            koleo_weight=0.1,
            masked_share=0.5,
            mask_ratios=(0.1, 0.5),
            local_crops=8,
            global_scale=(0.32, 1.0),
            local_scale=(0.05, 0.32),
            layer_decay=0.9,
            patch_embed_lr=0.2,
        ),
        optim=OptimConfig(
            base_lr=4e-3,  # x sqrt(2048 / 1024) = 5.7e-3
            scaling="root",
            min_lr=1e-6,
            schedule="dino",
            warmup_epochs=10 * EPOCH,
            betas=(0.9, 0.999),
            weight_decay=0.04,
            final_weight_decay=0.4,  # along half a cosine
            clip=3.0,
            clip_per_part=True,
        ),
        train=TrainConfig(
            epochs=100 * EPOCH,
            batch_size=2048,
            micro_batch=64,  # on 32 GPUs
            zero_stage=0,  # one pass steps student and teacher
            output=Path("runs/dinov2_vitl16"),
        ),
        evaluate=EvaluateConfig(knn_every=10),
    )


if __name__ == "__main__":
    launch(recipe)
