"""MoCo v3 pre-training of ResNet-50 on ImageNet-1k (Chen, Xie, He, arXiv 2104.02057).

    deepspeed recipes/mocov3_r50.py --data.path /imagenet/train --data.val-path /imagenet/val
    deepspeed recipes/mocov3_r50.py --demo

Published result: 72.8 % top-1 with a linear classifier after 300 epochs (released code).
"""

from pathlib import Path

try:
    from vitrail.engine.methods.moco_v3 import MoCoV3Config
    from vitrail.engine.models.resnet import ResNetConfig
    from vitrail.engine.train import EvaluateConfig, OptimConfig, RunConfig, TrainConfig, launch
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: install vitrail first, with `pip install -e .` in its folder") from None


def recipe() -> RunConfig:
    """The settings of the released code; for 100 epochs the learning rate is 0.6, for 1000 the momentum 0.996."""
    return RunConfig(
        method=MoCoV3Config(
            encoder=ResNetConfig(architecture="resnet50"),
            freeze_patch_embed=False,  # there is none
            projector_layers=2,
            predictor_norm=False,
            temperature=1.0,
            momentum=0.99,
            crop_scale=(0.2, 1.0),
        ),
        optim=OptimConfig(
            name="lars",
            base_lr=0.3,  # x 4096 / 256
            momentum=0.9,
            trust_coefficient=0.001,
            lars_variant="moco_v3",
            weight_decay=1e-6,
            warmup_epochs=10,
        ),
        train=TrainConfig(
            epochs=300,
            batch_size=4096,
            micro_batch=256,  # 16 GPUs; a backbone with batch normalisation cannot be cached
            zero_stage=0,  # for LARS
            output=Path("runs/mocov3_r50"),
        ),
        evaluate=EvaluateConfig(knn_every=10),
    )


if __name__ == "__main__":
    launch(recipe)
