"""DINO pre-training of ViT-B/8 on ImageNet-1k (Caron et al., arXiv 2104.14294).

    deepspeed recipes/dino_vitb8.py --data.path /imagenet/train --data.val-path /imagenet/val
    deepspeed recipes/dino_vitb8.py --demo

Published result: 77.4 % by nearest neighbours and 80.1 % with a linear classifier. The paper does not print the
settings of that run; these are those of the released ViT-B/16, with smaller patches.
"""

from dataclasses import replace
from pathlib import Path

try:
    from vitrail.engine.methods.dino import DINOConfig
    from vitrail.engine.models.vit import dino_vit, vit_base
    from vitrail.engine.train import EvaluateConfig, OptimConfig, RunConfig, TrainConfig, launch
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: install vitrail first, with `pip install -e .` in its folder") from None


def recipe() -> RunConfig:
    """The settings of ViT-B/16 with patches of 8 pixels: 785 tokens in a large crop, 145 in a small one."""
    return RunConfig(
        method=DINOConfig(
            encoder=replace(dino_vit(vit_base(patch_size=8)), drop_path=0.1),  # the student's
            prototypes=65_536,
            norm_last_layer=True,  # large networks are less stable
            freeze_last_layer=3,
            warmup_teacher_temp=0.04,
            teacher_temp=0.07,
            warmup_teacher_temp_epochs=50,
            momentum=0.996,  # to 1 along half a cosine
            local_crops=10,
            global_scale=(0.25, 1.0),
            local_scale=(0.05, 0.25),
        ),
        optim=OptimConfig(
            lr=7.5e-4,
            min_lr=2e-6,
            schedule="dino",
            warmup_epochs=10,
            betas=(0.9, 0.999),
            weight_decay=0.04,
            final_weight_decay=0.4,  # along half a cosine
            clip=0.3,
            clip_per_tensor=True,
        ),
        train=TrainConfig(
            epochs=300,
            batch_size=1024,
            micro_batch=8,
            zero_stage=0,  # one pass steps student and teacher
            checkpoint_activations=True,  # 12 blocks of 785 tokens
            output=Path("runs/dino_vitb8"),
        ),
        evaluate=EvaluateConfig(knn_every=10),
    )


if __name__ == "__main__":
    launch(recipe)
