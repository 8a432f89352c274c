"""SimSiam pre-training of ResNet-50 on ImageNet-1k (Chen and He, arXiv 2011.10566).

    deepspeed recipes/simsiam_r50.py --data.path /imagenet/train --data.val-path /imagenet/val
    deepspeed recipes/simsiam_r50.py --demo

Published result: 68.1 % top-1 with a linear classifier after 100 epochs (released code).
"""

from pathlib import Path

try:
    from vitrail.engine.methods.simsiam import SimSiamConfig
    from vitrail.engine.models.resnet import ResNetConfig
    from vitrail.engine.train import EvaluateConfig, OptimConfig, RunConfig, TrainConfig, launch
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: install vitrail first, with `pip install -e .` in its folder") from None


def recipe() -> RunConfig:
    """The settings of the released code."""
    return RunConfig(
        method=SimSiamConfig(
            encoder=ResNetConfig(architecture="resnet50", zero_init_residual=True),
            freeze_patch_embed=False,  # there is none
            dim=2048,
            hidden=512,
            crop_scale=(0.2, 1.0),
        ),
        optim=OptimConfig(
            name="sgd",
            base_lr=0.05,  # x 512 / 256; the predictor's stays at its peak
            momentum=0.9,
            weight_decay=1e-4,
            decay="all",
            warmup_epochs=0,
        ),
        train=TrainConfig(
            epochs=100,
            batch_size=512,
            micro_batch=64,  # 8 GPUs; batch statistics are those of all of them
            precision="fp32",
            zero_stage=1,
            output=Path("runs/simsiam_r50"),
        ),
        evaluate=EvaluateConfig(knn_every=10),
    )


if __name__ == "__main__":
    launch(recipe)
