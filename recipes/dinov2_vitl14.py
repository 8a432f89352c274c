"""DINOv2 pre-training of ViT-L/14 on ImageNet-22k (Oquab et al., arXiv 2304.07193): the released code's long setting.

    deepspeed recipes/dinov2_vitl14.py --data.path /imagenet22k --data.val-path /imagenet/val
    deepspeed recipes/dinov2_vitl14.py --demo

Published result of the released code with these settings: 82.0 % by nearest neighbours and 84.5 % with a linear
classifier. Its 500 epochs have 1,250 steps of 3,072 images each, whatever the data: 135 passes over ImageNet-22k.
`dinov2_vitl14_518.py` goes on from there with larger images.
"""

from dataclasses import replace
from pathlib import Path

try:
    from vitrail.engine.methods.dinov2 import DINOv2Config
    from vitrail.engine.models.vit import dinov2_vit, vit_large
    from vitrail.engine.train import EvaluateConfig, OptimConfig, RunConfig, TrainConfig, launch
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: install vitrail first, with `pip install -e .` in its folder") from None

PASS = 14_197_122 // 3072  # steps of one pass over ImageNet-22k


def recipe(name: str = "dinov2_vitl14", *, image_size: int = 224, steps: int = 500 * 1250) -> RunConfig:
    """The released code's settings for ViT-L/14.

    Args:
        name: of the output folder.
        image_size: side of the large crops.
        steps: length of the run, which all schedules are stretched to.
    """
    epoch = steps / 500 / PASS  # passes over the images in one of the released code's epochs
    return RunConfig(
        method=DINOv2Config(
            encoder=replace(dinov2_vit(vit_large(14, image_size)), mlp="swiglu", drop_path=0.4),  # in all blocks
            prototypes=131_072,
            bottleneck=384,
            patch_prototypes=131_072,  # a head of their own
            patch_bottleneck=256,
            centering="sinkhorn",
            freeze_last_layer=1 * epoch,
            warmup_teacher_temp=0.04,
            teacher_temp=0.07,
            warmup_teacher_temp_epochs=30 * epoch,
            momentum=0.994,  # to 1 along half a cosine
            koleo_weight=0.1,
            masked_share=0.5,
            mask_ratios=(0.1, 0.5),
            local_crops=8,
            local_size=98,  # 7 x 7 patches
            global_scale=(0.32, 1.0),
            local_scale=(0.05, 0.32),
            layer_decay=1.0,
            patch_embed_lr=0.2,
        ),
        optim=OptimConfig(
            base_lr=2e-4,  # x sqrt(3072 / 1024) = 3.5e-4
            scaling="root",
            min_lr=1e-6,
            schedule="dino",
            warmup_epochs=80 * epoch,
            betas=(0.9, 0.999),
            weight_decay=0.04,
            final_weight_decay=0.2,  # along half a cosine
            clip=3.0,
            clip_per_part=True,
        ),
        train=TrainConfig(
            epochs=500 * epoch,
            batch_size=3072,
            micro_batch=32,  # on 96 GPUs
            zero_stage=0,  # one pass steps student and teacher
            save_every=5,
            output=Path("runs") / name,
        ),
        evaluate=EvaluateConfig(knn_every=5),
    )


if __name__ == "__main__":
    launch(recipe)
