"""MoCo v2 pre-training of ResNet-50 on ImageNet-1k (Chen et al., arXiv 2003.04297).

    deepspeed recipes/mocov2_r50.py --data.path /imagenet/train --data.val-path /imagenet/val
    deepspeed recipes/mocov2_r50.py --demo

Published result: 67.5 % top-1 with a linear classifier after 200 epochs, 71.1 % after 800 (table 2 of the paper).
"""

from pathlib import Path

try:
    from vitrail.engine.methods.moco_v2 import MoCoV2Config
    from vitrail.engine.models.resnet import ResNetConfig
    from vitrail.engine.train import EvaluateConfig, OptimConfig, RunConfig, TrainConfig, launch
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: install vitrail first, with `pip install -e .` in its folder") from None


def recipe() -> RunConfig:
    """The settings of the released code."""
    return RunConfig(
        method=MoCoV2Config(
            encoder=ResNetConfig(architecture="resnet50"),
            dim=128,
            queue=65_536,  # a multiple of the batch
            momentum=0.999,
            temperature=0.2,
            batch_norm="shuffled",  # among 8 GPUs; on one, keys would be recognised by their batch's statistics
            crop_scale=(0.2, 1.0),
        ),
        optim=OptimConfig(
            name="sgd",
            base_lr=0.03,
            momentum=0.9,
            weight_decay=1e-4,
            decay="all",
            warmup_epochs=0,
        ),
        train=TrainConfig(
            epochs=200,
            batch_size=256,
            micro_batch=32,  # 8 GPUs: batch statistics are those of 32 images
            zero_stage=1,
            output=Path("runs/mocov2_r50"),
        ),
        evaluate=EvaluateConfig(knn_every=10),
    )


if __name__ == "__main__":
    launch(recipe)
