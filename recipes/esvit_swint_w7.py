"""EsViT pre-training of Swin-T with windows of 7 on ImageNet-1k (Li et al., arXiv 2106.09785).

    deepspeed recipes/esvit_swint_w7.py --data.path /imagenet/train --data.val-path /imagenet/val
    deepspeed recipes/esvit_swint_w7.py --demo

Published result: 75.7 % by nearest neighbours and 78.0 % with a linear classifier after 300 epochs.
"""

from dataclasses import replace
from pathlib import Path

try:
    from vitrail.engine.methods.esvit import EsViTConfig
    from vitrail.engine.models.swin import SwinConfig, swin_tiny
    from vitrail.engine.train import EvaluateConfig, OptimConfig, RunConfig, TrainConfig, launch
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: install vitrail first, with `pip install -e .` in its folder") from None


def recipe(encoder: SwinConfig | None = None, name: str = "esvit_swint_w7", region_epoch: float = 0) -> RunConfig:
    """The settings of the released code.

    Args:
        encoder: another network than Swin-T, with the student's stochastic depth.
        name: of the output folder.
        region_epoch: epoch from which regions are compared.
    """
    return RunConfig(
        method=EsViTConfig(
            encoder=encoder or replace(swin_tiny(window=7), drop_path=0.1),
            region_epoch=region_epoch,
            prototypes=65_536,  # of each of the two heads
            norm_last_layer=False,
            freeze_last_layer=1,
            warmup_teacher_temp=0.04,
            teacher_temp=0.07,
            warmup_teacher_temp_epochs=30,
            momentum=0.996,  # to 1 along half a cosine
            local_crops=8,
            global_scale=(0.4, 1.0),
            local_scale=(0.05, 0.4),
        ),
        optim=OptimConfig(
            base_lr=5e-4,  # x 512 / 256 = 1e-3
            min_lr=1e-6,
            schedule="dino",
            warmup_epochs=10,
            betas=(0.9, 0.999),
            weight_decay=0.04,
            final_weight_decay=0.4,  # along half a cosine
            clip=3.0,
            clip_per_tensor=True,
        ),
        train=TrainConfig(
            epochs=300,
            batch_size=512,
            micro_batch=32,
            zero_stage=0,  # one pass steps student and teacher
            output=Path("runs") / name,
        ),
        evaluate=EvaluateConfig(knn_every=10),
    )


if __name__ == "__main__":
    launch(recipe)
